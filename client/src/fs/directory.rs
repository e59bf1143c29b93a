//! Listing directories: pages from the server, handed out as the kernel's buffer has room.

use std::{sync::Arc, time::Duration};

use holdfast_common::{
    DirEntry, Ino, Kind,
    wire::meta::{MetaAnswer, Query},
};
use parking_lot::Mutex;

use super::{DirectoryPage, Errno, FileHandle, Fs, FsResult, OpenedDirectory, listings::Filling};
use crate::{remote::meta::unexpected, sys::boot_time};

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
    filling: Mutex<Filling>,
}

/// Entries that follow `after`, with the kernel's cookies.
#[derive(Clone, Debug)]
struct Page {
    after: u64,
    plus: bool,
    entries: Arc<Vec<DirEntry>>,
    end: bool,
    version: u64,
    /// If it came with the open, and nobody has been told of it: when it was asked for, and after how many changes of this mount.
    opened_with: Option<(Duration, u64)>,
}

/// A page that came with the open is as good as one that is asked for now for this long, if this mount has changed nothing meanwhile.
const OPENED_LIFE: Duration = Duration::from_millis(450);

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
    /// Asks the server only if the kernel has a listing that it might keep.
    pub async fn opendir(&self, ino: Ino) -> FsResult<OpenedDirectory> {
        let (keeps_listing, page) = match self.listings.kept(ino, boot_time()) {
            Some(kept) => self.compare_listing(ino, kept).await?,
            None => (false, None),
        };
        if keeps_listing {
            // The kernel will not say that it is read.
            self.note_listed(ino);
        }
        let handle = self.new_handle();
        let filling = Mutex::new(self.listings.open(ino, keeps_listing, boot_time()));
        self.directories.lock().insert(handle, Arc::new(OpenDirectory { ino, page: Mutex::new(page), filling }));
        Ok(OpenedDirectory { handle, keeps_listing })
    }

    /// Is the directory still at version `kept`? If not, its first page.
    async fn compare_listing(&self, ino: Ino, kept: u64) -> FsResult<(bool, Option<Page>)> {
        if let Some(version) = self.shared.meta.names().version(ino, boot_time()) {
            return Ok((version == kept, None));
        }
        let page = self.fetch_page(ino, 0, true, Some(kept)).await?;
        // The server may have lost something meanwhile, and count anew.
        let is_kept = self.listings.kept(ino, boot_time()) == Some(kept);
        Ok((page.is_none() && is_kept, page))
    }

    /// Entries after `cookie` (0: from the start); `plus`: with attributes.
    pub async fn readdir(&self, _ino: Ino, handle: FileHandle, cookie: u64, plus: bool) -> FsResult<DirectoryPage> {
        let directory = self.directories.lock().get(&handle).cloned().ok_or(Errno(libc::EBADF))?;
        if cookie == 0 {
            self.note_listed(directory.ino);
            self.listings.note_beginning(directory.ino, &directory.filling.lock(), boot_time());
        }
        let page = self.page_from(&directory, cookie, plus).await?;
        // The kernel may have been told to forget meanwhile what it gets now.
        self.listings.note_answer(directory.ino, boot_time());
        let rest = page.rest(cookie, plus).unwrap_or(DirectoryPage { entries: Vec::new(), end: true });
        let mut filling = directory.filling.lock();
        filling.note_page(page.version);
        if rest.entries.is_empty() && rest.end {
            self.listings.end(directory.ino, &filling);
        }
        Ok(rest)
    }

    /// The page that the directory's handle has, if `cookie` is in it.
    async fn page_from(&self, directory: &OpenDirectory, cookie: u64, plus: bool) -> FsResult<Page> {
        let kept = directory.page.lock().clone();
        // A rewind has to see the directory as it is now.
        let may_be_told = |page: &Page| match page.opened_with {
            Some(asked) => self.is_as_if_asked_now(asked),
            None => cookie > 0,
        };
        let page = match kept.filter(|page| may_be_told(page) && page.rest(cookie, plus).is_some()) {
            Some(page) => page,
            None => self.fetch_page(directory.ino, cookie, plus, None).await?.ok_or(Errno(libc::EIO))?,
        };
        let page = Page { opened_with: None, ..page };
        *directory.page.lock() = Some(page.clone());
        Ok(page)
    }

    fn is_as_if_asked_now(&self, (at, changes): (Duration, u64)) -> bool {
        boot_time() < at + OPENED_LIFE && self.shared.meta.names().changes() == changes
    }

    /// `None`: the directory is at the version `unless`.
    async fn fetch_page(&self, ino: Ino, cookie: u64, plus: bool, unless: Option<u64>) -> FsResult<Option<Page>> {
        let asked = (boot_time(), self.shared.meta.names().changes());
        let after = cookie.saturating_sub(DOT_DOT);
        let entries_max = if after == 0 { PAGE_FIRST } else { PAGE };
        match self.shared.meta.query(Query::ReadDir { ino, cookie: after, entries_max, plus, unless }).await? {
            MetaAnswer::Unchanged if unless.is_some() => Ok(None),
            MetaAnswer::Directory { entries: named, end, parent, version } => {
                let mut entries = dots(ino, parent.unwrap_or(ino), cookie);
                entries.extend(named.into_iter().map(|entry| self.shown(entry)));
                Ok(Some(Page {
                    after: cookie,
                    plus,
                    entries: Arc::new(entries),
                    end,
                    version,
                    opened_with: Some(asked),
                }))
            }
            other => Err(unexpected(&other)),
        }
    }

    fn shown(&self, entry: DirEntry) -> DirEntry {
        DirEntry { cookie: entry.cookie + DOT_DOT, attr: entry.attr.map(|attr| self.learn(attr)), ..entry }
    }

    pub fn releasedir(&self, _ino: Ino, handle: FileHandle) {
        if let Some(directory) = self.directories.lock().remove(&handle) {
            self.listings.close(directory.ino);
        }
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
