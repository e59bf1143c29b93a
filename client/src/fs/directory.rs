//! Listing directories: pages from the server, handed out as the kernel's buffer has room, and asked for ahead of who goes through a tree.

use std::{sync::Arc, time::Duration};

use holdfast_common::{
    DirEntry, Ino, Kind,
    wire::meta::{MetaAnswer, Query},
};
use parking_lot::Mutex;
use tokio::task::JoinHandle;

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
    /// If nobody has been told of it: when it was asked for.
    opened_with: Option<Asked>,
}

/// When something was asked for, and after how many changes of this mount.
type Asked = (Duration, u64);

/// A first page that was asked for before anybody wanted it.
#[derive(Debug)]
pub(super) struct Ahead {
    asked: Asked,
    answer: JoinHandle<FsResult<MetaAnswer>>,
}

fn first_page(ino: Ino) -> Query {
    Query::ReadDir { ino, cookie: 0, entries_max: PAGE_FIRST, plus: true, unless: None }
}

/// A page that came with the open, or ahead of it, is as good as one that is asked for now for this long, if this mount has changed nothing
/// meanwhile.
pub(super) const OPENED_LIFE: Duration = Duration::from_millis(450);

impl Page {
    /// The rest of this page after `cookie`, if the cookie is in it. With attributes it is good for those who want none, too: so asks the kernel
    /// whether there are more.
    fn rest(&self, cookie: u64, plus: bool) -> Option<DirectoryPage> {
        if plus && !self.plus {
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
        let is_new = |page: &Page| page.opened_with.is_some();
        let page = match kept.filter(|page| may_be_told(page) && page.rest(cookie, plus).is_some()) {
            Some(page) => page,
            None => match self.page_ahead(directory.ino, cookie, plus).await {
                Some(page) => page,
                None => self.fetch_page(directory.ino, cookie, plus, None).await?.ok_or(Errno(libc::EIO))?,
            },
        };
        if is_new(&page) {
            self.look_ahead(directory.ino, &page);
        }
        let page = Page { opened_with: None, ..page };
        *directory.page.lock() = Some(page.clone());
        Ok(page)
    }

    /// The first page, if it was asked for ahead and is as good as one that is asked for now.
    async fn page_ahead(&self, ino: Ino, cookie: u64, plus: bool) -> Option<Page> {
        if cookie > 0 {
            return None;
        }
        let ahead = self.walks.lock().take(ino)?;
        let answer = ahead.answer.await.ok()?.ok()?;
        let is_good = plus && self.is_as_if_asked_now(ahead.asked) && !self.has_open(&answer);
        let mut walks = self.walks.lock();
        if is_good {
            walks.note_used()
        } else {
            walks.note_vain()
        }
        drop(walks);
        if is_good { self.page_of(ino, 0, plus, ahead.asked, answer).ok() } else { None }
    }

    /// Of files that are open here more may be known by now.
    fn has_open(&self, answer: &MetaAnswer) -> bool {
        let MetaAnswer::Directory { entries, .. } = answer else { return false };
        let inodes = self.inodes.lock();
        entries.iter().any(|entry| inodes.contains_key(&entry.ino))
    }

    /// Somebody lists a directory, and gets this page: asks for those that come next, if that looks like a walk through a tree.
    fn look_ahead(&self, ino: Ino, page: &Page) {
        let below = page.entries.iter().filter(|entry| entry.kind == Kind::Directory && entry.cookie > DOT_DOT);
        let wanted = {
            let mut walks = self.walks.lock();
            walks.note_page(ino, page.after == 0, below.map(|entry| entry.ino));
            if page.after == 0 { walks.note_listed(ino) } else { Vec::new() }
        };
        for ino in wanted {
            let asked = (boot_time(), self.shared.meta.names().changes());
            let shared = Arc::clone(&self.shared);
            let answer = tokio::spawn(async move { shared.meta.query(first_page(ino)).await });
            self.walks.lock().note_asked(ino, Ahead { asked, answer });
        }
    }

    fn is_as_if_asked_now(&self, (at, changes): Asked) -> bool {
        boot_time() < at + OPENED_LIFE && self.shared.meta.names().changes() == changes
    }

    /// `None`: the directory is at the version `unless`.
    async fn fetch_page(&self, ino: Ino, cookie: u64, plus: bool, unless: Option<u64>) -> FsResult<Option<Page>> {
        let asked = (boot_time(), self.shared.meta.names().changes());
        let after = cookie.saturating_sub(DOT_DOT);
        let entries_max = if after == 0 { PAGE_FIRST } else { PAGE };
        match self.shared.meta.query(Query::ReadDir { ino, cookie: after, entries_max, plus, unless }).await? {
            MetaAnswer::Unchanged if unless.is_some() => Ok(None),
            answer => self.page_of(ino, cookie, plus, asked, answer).map(Some),
        }
    }

    fn page_of(&self, ino: Ino, cookie: u64, plus: bool, asked: Asked, answer: MetaAnswer) -> FsResult<Page> {
        match answer {
            MetaAnswer::Directory { entries: named, end, parent, version } => {
                let mut entries = dots(ino, parent.unwrap_or(ino), cookie);
                entries.extend(named.into_iter().map(|entry| self.shown(entry)));
                Ok(Page { after: cookie, plus, entries: Arc::new(entries), end, version, opened_with: Some(asked) })
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
        let syncing = self.shared.budget.begin_sync();
        self.shared.meta.barrier().await?;
        syncing.over();
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
