//! The operations of a filesystem in filesystem words, testable without a kernel.
//!
//! Every operation is a future that is ready at the first poll when memory can answer it: the FUSE adapter polls
//! once on its own thread and hands over to the runtime only what must wait for the network.

mod access;
mod data;
mod directory;
mod duties;
mod foreign;
mod inode;
mod listings;
mod locks;
mod namespace;
mod open;
mod plain;
mod shared;
mod told;
mod walks;

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_common::{
    Attr, DirEntry, Ino, Kind, Position, SessionId,
    config::Relaying,
    net::{Endpoint, Peers},
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

pub use self::{
    access::AccessTimes,
    duties::Duties,
    locks::{IsForeign, LockAsk},
    namespace::Found,
    shared::ClockDebug,
};
use self::{
    access::Accesses,
    directory::OpenDirectory,
    inode::Inode,
    listings::Listings,
    open::{OpenFile, Releases},
    plain::Plain,
    shared::{Shared, UPLOADS_IN_FLIGHT_MAX},
    told::{TOLD_LIFE, Told},
    walks::Walks,
};
use crate::{
    read::fetch::Fetcher,
    remote::{
        blocks::BlockClient,
        meta::{MetaClient, MountName},
    },
    write::{budget::DirtyBudget, commit::Committer},
};

/// What a program sees when an operation fails: an errno of `libc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

pub type FsResult<T> = Result<T, Errno>;

/// Who asks, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    /// 0..=0o777; takes bits from what the caller makes, unless the directory has a default list of permissions.
    pub umask: u32,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileHandle(pub u64);

/// A new inode as the caller asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MakeRequest {
    pub kind: Kind,
    /// Permission bits before the umask, 0..=0o7777.
    pub mode: u32,
    pub rdev: u32,
    /// Symlinks only.
    pub target: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub handle: FileHandle,
    /// The kernel's pages of this inode are still true.
    pub keep_cache: bool,
    /// The kernel must not keep pages of what goes through this handle: it appends, and only this mount's
    /// `Fs` knows where the end is.
    pub direct: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedDirectory {
    pub handle: FileHandle,
    /// The kernel's listing of the directory is still true.
    pub keeps_listing: bool,
}

/// A way to tell the kernel that it remembers something that is no longer true.
pub trait KernelCaches: Send + Sync + std::fmt::Debug {
    /// Attributes of `ino` that were told earlier are out of date. Must not block.
    fn attributes_changed(&self, ino: Ino);
    /// Its pages and attributes are. Waits until they are forgotten, which may need answers to reads of the same file.
    fn pages_changed(&self, ino: Ino);
    /// What it knows of `name` in `parent` is. Waits for operations in that directory.
    fn name_changed(&self, parent: Ino, name: &[u8]);
}

/// One page of a directory, with `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryPage {
    pub entries: Vec<DirEntry>,
    pub end: bool,
}

/// The bounds of one mount.
#[derive(Clone, Copy, Debug)]
pub struct FsOptions {
    /// Verified blocks in memory, bytes.
    pub cache_bytes: u64,
    /// Written and not yet stored, bytes: past it writers wait.
    pub dirty_bytes: u64,
    /// How long an operation waits for servers before it fails with `EIO`.
    pub io_timeout: Duration,
    /// How long the first contact may take.
    pub connect_timeout: Duration,
    pub relay: Relaying,
    pub access_times: AccessTimes,
}

/// The mounted filesystem, in place of a kernel's view of it.
#[derive(Debug)]
pub struct Fs {
    shared: Arc<Shared>,
    /// Files that are open here or have bytes on their way.
    inodes: Mutex<HashMap<Ino, Arc<Inode>>>,
    files: Mutex<HashMap<FileHandle, Arc<OpenFile>>>,
    directories: Mutex<HashMap<FileHandle, Arc<OpenDirectory>>>,
    listings: Listings,
    walks: Mutex<Walks<directory::Ahead>>,
    next_handle: AtomicU64,
    /// The version of the data that the kernel's pages of each inode show, until the kernel forgets it.
    kernel_versions: Mutex<HashMap<Ino, u64>>,
    releases: Releases,
    /// Processes that have locks, by file and the kernel's name, and as the metadata server knows them.
    lock_owners: Mutex<HashMap<(Ino, u64), locks::Owner>>,
    plain: Plain,
    told: Told,
    accesses: Accesses,
    read_ahead_max: u32,
    kernel: OnceLock<Arc<dyn KernelCaches>>,
}

impl Fs {
    /// Opens a session with the metadata server at `server`, on the current runtime. `Duties` has to be run beside it.
    /// The error is one sentence.
    pub async fn connect(
        peers: Arc<dyn Peers>,
        server: Endpoint,
        name: MountName,
        options: FsOptions,
        clock: Arc<dyn ClockDebug>,
    ) -> Result<Arc<Self>, String> {
        let meta =
            MetaClient::connect(Arc::clone(&peers), server, name, options.io_timeout, options.connect_timeout).await?;
        let blocks = BlockClient::new(peers, Arc::clone(&meta), options.io_timeout, options.relay);
        let shared = Shared {
            committer: Committer::start(&meta),
            fetcher: Arc::new(Fetcher::new(Arc::clone(&blocks), options.cache_bytes)),
            meta,
            blocks,
            budget: DirtyBudget::new(options.dirty_bytes),
            retained: Mutex::default(),
            upload_slots: Semaphore::new(UPLOADS_IN_FLIGHT_MAX),
            small_upload_slots: Semaphore::new(UPLOADS_IN_FLIGHT_MAX),
            io_timeout: options.io_timeout,
            clock,
        };
        let fs = Arc::new(Self {
            shared: Arc::new(shared),
            inodes: Mutex::default(),
            files: Mutex::default(),
            directories: Mutex::default(),
            listings: Listings::default(),
            walks: Mutex::default(),
            next_handle: AtomicU64::new(1),
            kernel_versions: Mutex::default(),
            releases: Releases::default(),
            lock_owners: Mutex::default(),
            plain: Plain::default(),
            told: Told::default(),
            accesses: Accesses::new(options.access_times),
            read_ahead_max: read_ahead_max(options.cache_bytes),
            kernel: OnceLock::new(),
        });
        let weak = Arc::downgrade(&fs);
        fs.shared.meta.tell_rolled_back(Box::new(move |after, through| {
            if let Some(fs) = weak.upgrade() {
                fs.roll_back(after, through);
            }
        }));
        let weak = Arc::downgrade(&fs);
        fs.shared.meta.tell_locks_lost(Box::new(move |inos| {
            if let Some(fs) = weak.upgrade() {
                fs.lose_locks(inos);
            }
        }));
        Ok(fs)
    }

    /// The server has lost what came after `after`; what this mount had done of it is done again, at or before `through`. What
    /// others had done may be gone, so nothing that the server said of any file is to be believed any more.
    fn roll_back(&self, after: Position, through: Position) {
        self.shared.retained.lock().moved(after, through);
        self.kernel_versions.lock().clear();
        self.listings.distrust();
        self.told.forget_all();
        let inodes: Vec<Arc<Inode>> = self.inodes.lock().values().cloned().collect();
        for inode in inodes {
            inode.lock().roll_back();
            if let Some(kernel) = self.kernel.get() {
                kernel.attributes_changed(inode.ino);
            }
        }
    }

    /// From now on `kernel` hears of what it must no longer believe. The first one counts.
    pub fn tell_kernel(&self, kernel: Arc<dyn KernelCaches>) {
        self.kernel.get_or_init(|| kernel);
    }

    /// How long the kernel may trust attributes and names.
    pub fn attribute_timeout(&self) -> Duration {
        inode::ATTRIBUTE_LIFE - TOLD_LIFE
    }

    /// Under which the metadata server knows this mount now.
    pub fn session(&self) -> SessionId {
        self.shared.meta.session()
    }

    /// Bytes written and not yet stored.
    pub fn dirty_bytes(&self) -> u64 {
        let retained = self.shared.retained.lock().bytes();
        self.shared.budget.used().saturating_sub(retained)
    }

    /// Bytes past which those who write much wait now: the limit, or less while fsyncs of little take long.
    pub fn dirty_bound(&self) -> u64 {
        self.shared.budget.bound()
    }

    /// Half of the budget is dirty: time to store what is old, before anyone has to wait.
    fn is_pressed(&self) -> bool {
        self.dirty_bytes() >= self.shared.budget.bound() / 2
    }

    /// Bytes of verified blocks in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.shared.fetcher.cached_bytes()
    }

    fn new_handle(&self) -> FileHandle {
        FileHandle(self.next_handle.fetch_add(1, Ordering::Relaxed))
    }

    fn inode(&self, ino: Ino) -> Option<Arc<Inode>> {
        self.inodes.lock().get(&ino).cloned()
    }

    /// Lets the state of a known file follow what the server said of it.
    fn learn(&self, attr: Attr) -> Attr {
        self.plain.learn(&attr);
        let attr = self.accesses.shown(attr);
        match self.inode(attr.ino) {
            Some(inode) => {
                let mut state = inode.lock();
                state.learn(attr);
                state.attr()
            }
            None => attr,
        }
    }
}

/// Chunks that one reader may have in flight ahead of it: at most an eighth of the cache, so that four readers do not
/// push out what they have fetched for each other.
fn read_ahead_max(cache_bytes: u64) -> u32 {
    u32::try_from(cache_bytes >> 23).unwrap_or(u32::MAX).clamp(2, 16)
}
