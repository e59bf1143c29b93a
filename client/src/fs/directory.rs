//! Listing directories: pages from the server, handed out as the kernel's buffer has room.

use std::sync::Arc;

use holdfast_common::{
    DirEntry, Ino, Kind,
    wire::meta::{MetaAnswer, Query},
};
use parking_lot::Mutex;

use super::{DirectoryPage, Errno, FileHandle, Fs, FsResult};
use crate::remote::meta::unexpected;

/// Cookies of `.` and `..`; those of the server come after.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;
/// Entries asked for at a time: small first, for directories that are only peeked into.
const PAGE_FIRST: u32 = 256;
const PAGE: u32 = 2048;
/// Entries handed out at a time: more than the kernel's buffer takes would be copied for nothing.
const HANDED_OUT_MAX: usize = 128;

#[derive(Debug)]
pub(super) struct OpenDirectory {
    ino: Ino,
    page: Mutex<Option<Page>>,
}

/// Entries that follow `after`, with the kernel's cookies.
#[derive(Clone, Debug)]
struct Page {
    after: u64,
    plus: bool,
    entries: Arc<Vec<DirEntry>>,
    end: bool,
}

impl Page {
    /// The rest of this page after `cookie`, if the cookie is in it.
    fn rest(&self, cookie: u64, plus: bool) -> Option<DirectoryPage> {
        if self.plus != plus {
            return None;
        }
        // Cookies ascend.
        let start = match cookie == self.after {
            true => 0,
            false => self.entries.binary_search_by_key(&cookie, |entry| entry.cookie).ok()? + 1,
        };
        let rest = &self.entries[start..];
        (!rest.is_empty() || self.end).then(|| DirectoryPage {
            entries: rest.iter().take(HANDED_OUT_MAX).cloned().collect(),
            end: self.end && rest.len() <= HANDED_OUT_MAX,
        })
    }
}

impl Fs {
    #[expect(clippy::unused_async, reason = "opening may come to ask the server; its callers need not change then")]
    pub async fn opendir(&self, ino: Ino) -> FsResult<FileHandle> {
        let handle = self.new_handle();
        self.directories.lock().insert(handle, Arc::new(OpenDirectory { ino, page: Mutex::default() }));
        Ok(handle)
    }

    /// Entries after `cookie` (0: from the start); `plus`: with attributes.
    pub async fn readdir(&self, _ino: Ino, handle: FileHandle, cookie: u64, plus: bool) -> FsResult<DirectoryPage> {
        let directory = self.directories.lock().get(&handle).cloned().ok_or(Errno(libc::EBADF))?;
        if cookie == 0 {
            self.note_listed(directory.ino);
        }
        // A rewind has to see the directory as it is now.
        let kept = if cookie == 0 { None } else { directory.page.lock().clone() };
        if let Some(rest) = kept.and_then(|page| page.rest(cookie, plus)) {
            return Ok(rest);
        }
        let page = self.fetch_page(directory.ino, cookie, plus).await?;
        let all = page.rest(cookie, plus).unwrap_or(DirectoryPage { entries: Vec::new(), end: true });
        *directory.page.lock() = Some(page);
        Ok(all)
    }

    async fn fetch_page(&self, ino: Ino, cookie: u64, plus: bool) -> FsResult<Page> {
        let after = cookie.saturating_sub(DOT_DOT);
        let entries_max = if after == 0 { PAGE_FIRST } else { PAGE };
        match self.shared.meta.query(Query::ReadDir { ino, cookie: after, entries_max, plus }).await? {
            MetaAnswer::Directory { entries: named, end, parent } => {
                let mut entries = dots(ino, parent.unwrap_or(ino), cookie);
                entries.extend(named.into_iter().map(|entry| self.shown(entry)));
                Ok(Page { after: cookie, plus, entries: Arc::new(entries), end })
            }
            other => Err(unexpected(&other)),
        }
    }

    fn shown(&self, entry: DirEntry) -> DirEntry {
        DirEntry { cookie: entry.cookie + DOT_DOT, attr: entry.attr.map(|attr| self.learn(attr)), ..entry }
    }

    pub fn releasedir(&self, _ino: Ino, handle: FileHandle) {
        self.directories.lock().remove(&handle);
    }

    /// Names made and removed before are durable when this returns.
    pub async fn fsyncdir(&self, _ino: Ino) -> FsResult<()> {
        self.shared.meta.barrier().await?;
        self.shared.meta.hear_failure()
    }
}

/// `.` and `..`, as far as they come after `cookie`.
fn dots(ino: Ino, parent: Ino, cookie: u64) -> Vec<DirEntry> {
    let dot =
        |cookie, name: &[u8], ino| DirEntry { cookie, name: name.to_vec(), ino, kind: Kind::Directory, attr: None };
    let dots = [dot(DOT, b".", ino), dot(DOT_DOT, b"..", parent)];
    dots.into_iter().filter(|entry| entry.cookie > cookie).collect()
}
