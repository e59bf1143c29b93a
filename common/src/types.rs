//! The nouns of the filesystem, as both sides say them. Pure.

use serde::{Deserialize, Serialize};

use crate::{
    block::BlockHash,
    limits::{REPLICAS_MAX, REPLICAS_MIN},
};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// An inode's number. Never reused.
    Ino(u64)
);
number!(
    /// Which mebibyte of a file.
    ChunkIndex(u32)
);
number!(
    /// A storage server, as its certificate names it. Counted from 1.
    ServerId(u32)
);
number!(
    /// One life of a mount, from `OpenSession` to its end or expiry. Never reused.
    SessionId(u64)
);
number!(
    /// The place of a mutation among those of its session. Counted from 1.
    Sequence(u64)
);
number!(
    /// The place of an entry in the metadata log. Counted from 1.
    Position(u64)
);
number!(
    /// One life of a storage server's unsynced data: changes whenever a block that was
    /// acknowledged as visible, but not as durable, may have been lost.
    BootId(u64)
);
number!(
    /// Garbage epoch, see DESIGN 7.
    Epoch(u64)
);

impl Ino {
    const CHOSEN: u64 = 1 << 62;
    const SESSIONS: u64 = 1 << 30;

    /// The `count`th number that a mount gives to what it makes, in this session. The server's own are all below. `None`: a session with so high a number
    /// chooses none.
    pub fn chosen(session: SessionId, count: u32) -> Option<Self> {
        (session.0 < Self::SESSIONS).then(|| Self(Self::CHOSEN | session.0 << 32 | u64::from(count)))
    }

    pub fn is_chosen(self) -> bool {
        self.0 >> 62 == 1
    }

    pub const ROOT: Self = Self(1);
}

/// Sixteen random bytes, made once by `holdfast init`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl std::fmt::Display for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

/// A point in time: seconds and nanoseconds (0..1e9) since 1970-01-01T00:00:00Z, also before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    pub secs: i64,
    pub nanos: u32,
}

impl Time {
    /// The next that can be told from it.
    #[must_use]
    pub fn after_a_nanosecond(self) -> Self {
        self.after(std::time::Duration::from_nanos(1))
    }

    /// So much later; at most the last second there is.
    #[must_use]
    pub fn after(self, time: std::time::Duration) -> Self {
        let nanos = u64::from(self.nanos) + u64::from(time.subsec_nanos());
        let secs = time.as_secs() + nanos / NANOS_PER_SEC;
        let rest = u32::try_from(nanos % NANOS_PER_SEC).unwrap_or_default();
        Self { secs: self.secs.saturating_add_unsigned(secs), nanos: rest }
    }
}

const NANOS_PER_SEC: u64 = 1_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// How many copies are kept of the blocks of a file, or of what is made in a directory: a number of its own, or the cluster's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Replicas(u8);

impl Replicas {
    /// As many as the cluster has by default.
    pub const INHERITED: Self = Self(0);

    /// A number of its own; `None` unless it is in 1..=`REPLICAS_MAX`.
    pub fn new(count: usize) -> Option<Self> {
        let count = u8::try_from(count).ok()?;
        (1..=REPLICAS_MAX).contains(&usize::from(count)).then_some(Self(count))
    }

    /// The number, or `default`.
    pub fn or(self, default: usize) -> usize {
        self.own().unwrap_or(default)
    }

    /// The number, if it is one of its own.
    pub fn own(self) -> Option<usize> {
        (self.0 > 0).then(|| usize::from(self.0).min(REPLICAS_MAX))
    }

    /// As a row has it: 0 for none of its own.
    pub fn byte(self) -> u8 {
        self.0
    }

    /// What [`Replicas::byte`] gave; `None` for anything else.
    pub fn from_byte(byte: u8) -> Option<Self> {
        (usize::from(byte) <= REPLICAS_MAX).then_some(Self(byte))
    }
}

/// Of as many wanted copies so many have to be durable before a write is acknowledged as durable.
pub fn enough_replicas(wanted: usize) -> usize {
    wanted.min(REPLICAS_MIN)
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    pub ino: Ino,
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky, 0..=0o7777, and above them the flags of [`mode`].
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    /// Bytes. For a symlink the length of its target.
    pub size: u64,
    /// Bytes that pieces cover: holes do not count.
    pub stored: u64,
    pub rdev: u32,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Time,
    /// Grows with every change of the file's bytes or size: equal numbers mean equal data.
    pub data_version: u64,
    pub replicas: Replicas,
}

impl Attr {
    /// An inode for tests: 0o755, one link, nothing in it, made at the beginning of time.
    #[doc(hidden)]
    pub fn example(ino: u64, kind: Kind) -> Self {
        let time = Time::default();
        Self {
            ino: Ino(ino),
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
            nlink: 1,
            size: 0,
            stored: 0,
            rdev: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            data_version: 0,
            replicas: Replicas::INHERITED,
        }
    }
}

/// What is above the permission bits of an inode's mode: which attributes it has that the kernel asks for again and again, so that
/// a client knows without asking that there are none.
pub mod mode {
    /// setuid, setgid, sticky, and read, write, execute for owner, group and others.
    pub const PERMISSIONS: u32 = 0o7777;
    /// Of a directory: what is made in it gets its group, and directories this bit too.
    pub const SETGID: u32 = 0o2000;
    /// `system.posix_acl_access`.
    pub const HAS_ACCESS_LIST: u32 = 1 << 16;
    /// `system.posix_acl_default`.
    pub const HAS_DEFAULT_LIST: u32 = 1 << 17;
    /// `security.capability`.
    pub const HAS_CAPABILITY: u32 = 1 << 18;
    /// It was made without a name, and may be given one.
    pub const IS_LINKABLE: u32 = 1 << 19;
}

/// A run of a chunk's bytes that one block holds: bytes `block_offset..block_offset+length` of `block`
/// are bytes `offset..offset+length` of the chunk. `1 <= length`, `offset + length <= CHUNK_SIZE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Piece {
    pub offset: u32,
    pub length: u32,
    pub block: BlockHash,
    pub block_offset: u32,
}

impl Piece {
    /// First offset in the chunk past this piece.
    pub fn end(&self) -> u32 {
        self.offset + self.length
    }
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Where to go on after this entry. Stays valid while the directory changes, never 0.
    pub cookie: u64,
    /// 1..=255 bytes, no `/`, no NUL; not `.` or `..`.
    pub name: Vec<u8>,
    pub ino: Ino,
    pub kind: Kind,
    /// Present in `ReadDir { plus: true, .. }`.
    pub attr: Option<Attr>,
}
