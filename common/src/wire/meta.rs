//! Requests to the metadata server.

use serde::{Deserialize, Serialize};

use crate::{
    block::BlockHash,
    cluster::{ClusterMap, ServerState, Standing},
    locks::{Lock, LockClass, LockKind, LockRange},
    net::identity::Role,
    refusal::Refusal,
    types::{
        Attr, BootId, ChunkIndex, ClusterId, DirEntry, Epoch, Ino, Kind, Piece, Position, Replicas, Sequence, ServerId,
        SessionId, Time, mode,
    },
};

/// Header of a request. No payload follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaRequest {
    Session(SessionRequest),
    Query {
        /// Who asks: a mount sees what others have only told their programs yet, see [`Lease::sole`]. 0: nobody who changes anything.
        session: SessionId,
        query: Query,
    },
    /// Exactly once (I5): a sequence that has been answered gets the same answer again.
    Mutate {
        session: SessionId,
        sequence: Sequence,
        /// Every sequence below this has been answered to the client: those replies may be dropped.
        answered_below: Sequence,
        /// The reply waits until the mutation is durable: its blocks on their servers and its entry in the log.
        durable: bool,
        op: Op,
    },
    /// Everything this session had applied before is durable when the reply comes.
    Barrier {
        session: SessionId,
    },
    Storage(StorageNotice),
    Admin(AdminRequest),
    Lock {
        session: SessionId,
        request: LockRequest,
    },
    /// As many `Mutate`, in this order: at most `MUTATIONS_MAX`. Answered `MutatedMany`, or refused as a whole when none of the rest was
    /// carried out: asked again it goes on from there.
    MutateMany {
        session: SessionId,
        answered_below: Sequence,
        changes: Vec<(Sequence, Op)>,
    },
}

/// Advisory locks. Role: client. They are kept in memory: after a restart of the server each mount tells its own again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockRequest {
    /// Takes a lock, changes one, or (without a `kind`) lets go. Answered `Granted`, `Held`, or with `wait` `Waiting`: then
    /// `sequence` is the ticket. Executed once: a sequence that has been answered gets the same answer again.
    Set {
        sequence: Sequence,
        /// Every sequence below this has been answered to the client.
        answered_below: Sequence,
        ino: Ino,
        class: LockClass,
        owner: u64,
        range: LockRange,
        kind: Option<LockKind>,
        pid: u32,
        wait: bool,
        /// The mount knows of all changes through this one, see [`Foreign`].
        since: Position,
    },
    /// Stops waiting. Answered `Free`; or `Granted`, when it came too late.
    Cancel { ticket: Sequence, since: Position },
    /// Answered `Held`, by somebody who would be in the way, or `Free`.
    Test { ino: Ino, class: LockClass, owner: u64, range: LockRange, kind: LockKind },
    /// Gives a file's delegation back, with all that the mount's processes hold of the file, at most `DELEGATED_LOCKS_MAX`. Answered
    /// `Free`. Under a number that is not (any more) the mount's for that file it changes nothing.
    Return { ino: Ino, number: u64, locks: Vec<Lock> },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockAnswer {
    /// With what others have changed meanwhile: whoever held the lock before may have.
    Granted(Foreign),
    Held(Lock),
    /// An `Event` will tell when it is granted.
    Waiting,
    /// Let go, or nobody holds it.
    Free,
    /// As `Granted`; and until the server asks for it back (`Event::Recall`), the mount decides on this file's locks by itself, as long
    /// as it asked something within the last `valid_ms` milliseconds that was answered.
    Delegated {
        foreign: Foreign,
        number: u64,
        valid_ms: u64,
    },
}

/// What other mounts have changed after a position, through another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    pub through: Position,
    pub changes: Vec<Change>,
    pub reach: Reach,
}

/// How far back `changes` are complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// Over all that was asked for.
    Complete,
    /// Over the last `FOREIGN_SPAN` only.
    Recent,
    #[default]
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Change {
    /// Attributes or data.
    Inode(Ino),
    /// What a name stands for.
    Name(Ino, Vec<u8>),
}

/// What a server has to say to a mount without being asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Of a lock that was waited for.
    Granted { ticket: Sequence, foreign: Foreign },
    /// Others ask for locks of a file that is delegated to the mount: it has to `Return` it.
    Recall { ino: Ino, number: u64 },
    /// A lock is not waited for any more, and has to be asked for anew: the answer may be another now.
    AskAgain { ticket: Sequence },
    /// Others want to change the directory. The mount gives the lease back by having heard of this.
    RecallLease(Lease),
}

/// Nobody but this session changes names in the directory, until `DIRECTORY_LEASE` after the session sent what was answered with this, or
/// until it has heard that the lease is recalled. A number that it had before means that nobody has since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub directory: Ino,
    pub number: u64,
    /// If not 0, nobody else is told of names there either before the session has heard that: it may tell its programs that names are gone
    /// before it has told the server. The same number again means that nobody else has been told since it was first given.
    pub sole: u64,
}

/// Role: client (and admin).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionRequest {
    /// A new session. `instance` is random, chosen by the mount once: asked again (lost reply) it gets the same session.
    Open { instance: [u8; 16], host: String, mountpoint: String },
    /// Renews the session; tells how much is dirty (for `status`). Every few seconds.
    /// After the metadata server restarted (another `server_instance`), the client sends `Reopen`.
    Renew { session: SessionId, dirty_bytes: u64, repairs: u64 },
    /// After a restart of the server: which inodes this session holds open, so that unlinked ones stay (I9). Answered
    /// `Reopened`; refused `Unavailable` if the server is not `instance` any more. `None`: the mount relies on nothing that an earlier one said.
    /// `is_behind`: its programs know of changes that it has still to ask for; sent again without when that is done.
    Reopen { session: SessionId, opens: Vec<Ino>, instance: Option<u64>, is_behind: bool },
    /// Ends the session: its opens are released.
    Close { session: SessionId },
    /// Adds `opened` to, and removes `released` from, the inodes that this session holds open. Idempotent sets, not counts.
    Opens { session: SessionId, opened: Vec<Ino>, released: Vec<Ino> },
    /// What the server has lost of this session's changes, to be made again (I3). Part `part` of `parts` (at least one,
    /// also with nothing in it). Answered `Replayed` when every mount's are made, in their old order. Asked again it makes nothing
    /// twice.
    Replay { session: SessionId, part: u32, parts: u32, changes: Vec<LostChange> },
    /// After a restart of the server, before `Reopen`: locks that this session holds, at most `RELOCK_MAX`. Answered `Relocked`.
    Relock { session: SessionId, locks: Vec<(Ino, Lock)> },
    /// Asks for what the server has to say. Events through `heard` of the server `instance`
    /// have arrived. Answered `Events` when there is one, or after
    /// `LISTEN_PATIENCE` without any.
    Listen { session: SessionId, heard: u64, instance: u64, since: Position },
}

/// A change that was answered, and that the metadata server may have lost with its power.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostChange {
    /// Where it was in the order of all changes.
    pub position: Position,
    /// Under which it was made.
    pub sequence: Sequence,
    pub op: Op,
    /// The inode that a `Make` was answered with: whoever knows it has to find it again.
    pub made: Option<Ino>,
    /// When it was made, by the server's clock.
    pub time: Option<Time>,
}

/// What became of a change that was to be made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    pub sequence: Sequence,
    /// Its new place in the order.
    pub result: Result<Position, Refusal>,
}

/// Reads. Role: client, admin. Linearizable: sees every mutation that was answered before it was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    Lookup {
        parent: Ino,
        name: Vec<u8>,
    },
    GetAttr {
        ino: Ino,
    },
    /// Attributes now, and the map of chunks `0..chunks`; registers the open (as `SessionRequest::Opens` does).
    /// Refused `NotFound` if the inode has no link left and this session does not hold it open.
    Open {
        ino: Ino,
        chunks: u32,
    },
    ReadLink {
        ino: Ino,
    },
    /// Entries after `cookie` (0: from the start), without `.` and `..`: at most `entries_max` (≤ READDIR_PAGE_MAX). Only if the directory is not at
    /// the version `unless`.
    ReadDir {
        ino: Ino,
        cookie: u64,
        entries_max: u32,
        plus: bool,
        unless: Option<u64>,
    },
    GetXattr {
        ino: Ino,
        name: Vec<u8>,
    },
    ListXattr {
        ino: Ino,
    },
    /// Pieces of chunks `first..first+count`, `count` ≤ 1024, with the holders of their blocks. Chunks that are all hole are left out.
    Pieces {
        ino: Ino,
        first: ChunkIndex,
        count: u32,
    },
    /// Next data or hole at or after `offset` (lseek SEEK_DATA / SEEK_HOLE); `NotFound` stands for ENXIO.
    /// Answered `OffsetBeyond` where the file is long.
    Seek {
        ino: Ino,
        offset: u64,
        hole: bool,
    },
    StatFs,
    /// Answered at once if the map is newer than `have`.
    ClusterMap {
        have: u64,
    },
}

/// What changes the tree. Its time comes from the server, except that of `Remove`, `Place` and `PlaceOpen`; uid and gid of new inodes come from the caller.
/// Permissions are checked by the kernel (`default_permissions`), except for stickiness and the rest of
/// what only the server can know atomically.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// create, mkdir, mknod, symlink. Inherits the group (and, for directories, setgid) of a setgid parent.
    Make {
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
        exclusive: bool,
        open: bool,
    },
    Link {
        ino: Ino,
        parent: Ino,
        name: Vec<u8>,
    },
    /// Not for directories.
    Unlink {
        parent: Ino,
        name: Vec<u8>,
    },
    Rmdir {
        parent: Ino,
        name: Vec<u8>,
    },
    Rename {
        from: Ino,
        from_name: Vec<u8>,
        to: Ino,
        to_name: Vec<u8>,
        mode: RenameMode,
    },
    SetAttr {
        ino: Ino,
        set: SetAttr,
    },
    SetXattr {
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        mode: XattrMode,
    },
    RemoveXattr {
        ino: Ino,
        name: Vec<u8>,
    },
    /// New data of many files. Each file stands alone: one that is refused (Stale) does not stop the others.
    Commit {
        files: Vec<FileCommit>,
        blocks: Vec<NewBlock>,
    },
    /// Shares pieces: bytes `from_offset..+length` of `from` become those of `to` at `to_offset` (copy_file_range).
    CopyRange {
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        length: u64,
    },
    /// `offset..offset+length` becomes a hole (or, past the end and with `grow`, the size grows).
    Punch {
        ino: Ino,
        offset: u64,
        length: u64,
        grow: bool,
    },
    /// As a `Commit` of one file, at its end: refused `Busy` unless the file has `at_size` bytes. Whoever is refused lays its
    /// pieces at the end that there is by then.
    Append {
        file: FileCommit,
        blocks: Vec<NewBlock>,
        at_size: u64,
    },
    /// Files that were read, and when: at most `ACCESSED_MAX`. Their times of access become later, never earlier, and only if that is
    /// `always` wanted, or the file has changed since its last access, or a day has passed. Nothing else of them changes. Those that
    /// are gone are passed over.
    Accessed {
        files: Vec<(Ino, Time)>,
        always: bool,
    },
    /// `O_TMPFILE`: a file without a name, open by this session, that inherits from the directory `parent` as one made there would.
    /// If it is `linkable`, `Link` gives it a name, until that is its last.
    MakeUnnamed {
        parent: Ino,
        new: NewInode,
        linkable: bool,
    },
    /// `Unlink` or `Rmdir`, whichever it takes, of a name that stands for `ino`: refused `NotFound` if it does not. For a mount that has
    /// told its programs already that the name is gone, at `time`: so that is when it went, unless it is still to come.
    Remove {
        parent: Ino,
        name: Vec<u8>,
        ino: Ino,
        time: Time,
    },
    /// As an exclusive `Make`, of an inode whose number the mount has chosen ([`Ino::chosen`]), and told to its programs at `time` as in `Remove`.
    /// Asked for anew it is found to be made.
    Place {
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
        ino: Ino,
        time: Time,
    },
    /// As a `Place`, and open by this session then, as after a `Make` with `open`, however many it has.
    PlaceOpen {
        parent: Ino,
        name: Vec<u8>,
        new: NewInode,
        ino: Ino,
        time: Time,
    },
}

impl Op {
    /// The directories whose entries it changes.
    pub fn directories(&self) -> Vec<Ino> {
        match self {
            Self::Make { parent, .. }
            | Self::Link { parent, .. }
            | Self::Unlink { parent, .. }
            | Self::Rmdir { parent, .. }
            | Self::Remove { parent, .. }
            | Self::Place { parent, .. }
            | Self::PlaceOpen { parent, .. } => vec![*parent],
            Self::Rename { from, to, .. } if from == to => vec![*from],
            Self::Rename { from, to, .. } => vec![*from, *to],
            _ => Vec::new(),
        }
    }

    /// The name and the inode of a `Remove`, a `Place` or a `PlaceOpen`.
    pub fn ahead(&self) -> Option<((Ino, &[u8]), Ino)> {
        match self {
            Self::Remove { parent, name, ino, .. }
            | Self::Place { parent, name, ino, .. }
            | Self::PlaceOpen { parent, name, ino, .. } => Some(((*parent, name), *ino)),
            _ => None,
        }
    }

    /// The new directory that it was answered with, if it made one.
    pub fn made_directory(&self, outcome: &Mutated) -> Option<Ino> {
        match (self, outcome) {
            (Self::Make { .. } | Self::Place { .. }, Mutated::Inode { attr, created: true })
                if attr.kind == Kind::Directory =>
            {
                Some(attr.ino)
            }
            _ => None,
        }
    }

    /// Does it make the metadata larger, and may be refused for that? No `_` arm: a new operation must say so.
    pub fn grows(&self) -> bool {
        match self {
            Self::Make { .. }
            | Self::MakeUnnamed { .. }
            | Self::Link { .. }
            | Self::SetXattr { .. }
            | Self::CopyRange { .. }
            | Self::Append { .. } => true,
            // One of no file only says who has its blocks.
            Self::Commit { files, .. } => !files.is_empty(),
            Self::Unlink { .. }
            | Self::Rmdir { .. }
            | Self::Remove { .. }
            // The programs have been told; see `Lease::sole`.
            | Self::Place { .. }
            | Self::PlaceOpen { .. }
            | Self::Rename { .. }
            | Self::SetAttr { .. }
            | Self::RemoveXattr { .. }
            | Self::Punch { .. }
            | Self::Accessed { .. } => false,
        }
    }

    /// The files that get new bytes by it.
    pub fn written_files(&self) -> Vec<Ino> {
        match self {
            Self::Commit { files, .. } => files.iter().map(|file| file.ino).collect(),
            Self::Append { file, .. } => vec![file.ino],
            _ => Vec::new(),
        }
    }

    /// The blocks that it brings, with who has them.
    pub fn new_blocks(&self) -> &[NewBlock] {
        match self {
            Self::Commit { blocks, .. } | Self::Append { blocks, .. } => blocks,
            _ => &[],
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInode {
    pub kind: Kind,
    /// 0..=0o7777, and in the bits from `UMASK_SHIFT` on the maker's umask: it applies unless the directory has a default list of
    /// permissions.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Symlinks only, else empty.
    pub target: Vec<u8>,
}

impl NewInode {
    /// What becomes of it in a directory that has no default list of permissions.
    pub fn attr(&self, ino: Ino, parent: &Attr, time: Time) -> Attr {
        let is_directory = self.kind == Kind::Directory;
        let inherits = parent.mode & mode::SETGID != 0;
        let setgid = if inherits && is_directory { mode::SETGID } else { 0 };
        let is_device = matches!(self.kind, Kind::CharDevice | Kind::BlockDevice);
        Attr {
            ino,
            kind: self.kind,
            mode: self.mode & mode::PERMISSIONS & !(self.mode >> UMASK_SHIFT) | setgid,
            uid: self.uid,
            gid: if inherits { parent.gid } else { self.gid },
            nlink: if is_directory { 2 } else { 1 },
            size: self.target.len() as u64,
            stored: 0,
            rdev: if is_device { self.rdev } else { 0 },
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            data_version: 0,
            replicas: parent.replicas,
        }
    }
}

/// The extended attribute of a file or directory that says how many copies are kept of its blocks, or of what is made in it: a number in
/// decimal.
pub const REPLICAS_ATTRIBUTE: &str = "holdfast.replicas";

/// Where the umask is in `NewInode::mode`.
pub const UMASK_SHIFT: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
    /// As `Replace`, with a whiteout (a character device 0:0 without permissions) left at the old name in the same step: for a layer
    /// of an overlay filesystem.
    Whiteout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum XattrMode {
    Set,
    Create,
    Replace,
}

/// What stays `None` stays as it is. ctime becomes the server's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Truncates or extends; mtime becomes the server's time unless given.
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    /// The caller is not privileged: setuid and setgid bits go as the kernel's rules say.
    pub clear_suid: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetTime {
    Now,
    At(Time),
}

/// New bytes of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileCommit {
    pub ino: Ino,
    /// Laid over what is there, in order. Every block is in `blocks` of the same commit or known to the server.
    pub pieces: Vec<(ChunkIndex, Piece)>,
    /// The size becomes the larger of this and what it is.
    pub size_at_least: u64,
    /// When the last of these bytes was written, by the client's clock.
    pub mtime: Time,
    /// A write by someone unprivileged: setuid and setgid go.
    pub clear_suid: bool,
    /// Refused `Busy` unless these chunks still have the pieces with this digest (`pieces::digest`): for pieces that were
    /// made by reading those.
    pub only_over: Vec<(ChunkIndex, u64)>,
}

/// A block that this commit names, with who acknowledged it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewBlock {
    pub hash: BlockHash,
    pub length: u32,
    /// At least as many as are enough ([`crate::enough_replicas`]) for the files. Fewer than these want: the rest is owed.
    pub holders: Vec<Holder>,
    /// What the holders' copies were stamped with, at least. Refused `BlockGone` if garbage of this name has been, or may have
    /// been, collected since: the block has to be put again with the epoch that the answer tells.
    pub epoch: Epoch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub server: ServerId,
    /// Under which the block was acknowledged.
    pub boot: BootId,
    /// Known to be on stable storage there.
    pub durable: bool,
}

/// Role: storage, and only about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "nearly all are heartbeats")]
pub enum StorageNotice {
    /// At start and then every second.
    Heartbeat { address: std::net::SocketAddr, zone: String, boot: BootId, load: StorageLoad },
    /// Role client: the copy on `server` was bad in this way. `repaired`: it answered that it replaced it.
    BadCopy { block: BlockHash, server: ServerId, fault: CopyFault, repaired: bool },
    /// Blocks, at most `HASH_LIST_MAX`, of which this server has found its own copies bad: good ones are to take their place.
    BadCopies { blocks: Vec<BlockHash> },
    /// This server has to stop, for a reason that is on its side: its disk, say.
    Failed { why: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyFault {
    Missing,
    Damaged,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageLoad {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub stored_bytes: u64,
    pub blocks: u64,
    /// Records found damaged since the data directory was made.
    pub corrupt_found: u64,
    /// Records replaced by a good copy, likewise.
    pub repaired: u64,
    pub quarantined: u64,
    /// One-minute load average × 100.
    pub load_percent: u32,
    pub memory_bytes: u64,
    pub queue_depth: u32,
    /// When the process started, in milliseconds since 1970.
    pub started_ms: u64,
    /// Bytes that have been read and checked in the pass of scrubbing that is under way.
    pub scrub_checked_bytes: u64,
    /// Full passes since the data directory was made.
    pub scrub_passes: u64,
    /// When the last one ended, in seconds since 1970; 0: never.
    pub scrub_last_pass_secs: u64,
    /// Puts and gets of mounts in the last second, and microseconds that one took: on average, half of them at most, 99 in 100 at most.
    pub puts: u32,
    pub gets: u32,
    pub request_mean_us: u32,
    pub put_p50_us: u32,
    pub put_p99_us: u32,
    pub get_p50_us: u32,
    pub get_p99_us: u32,
    /// Of the machine in the last second: of all cores together, 0 to 100.
    pub cpu_percent: u32,
    /// Part of that second in which its disk was at work, 0 to 100; 0 also if the disk is not known.
    pub disk_busy_percent: u32,
    /// Memory of the machine that is free, or would be if it were needed.
    pub memory_available_bytes: u64,
    /// Sent and received, in that second, over all interfaces.
    pub network_bytes: u64,
    /// Means of the requests above, one kind at a time.
    pub put_mean_us: u32,
    pub get_mean_us: u32,
    /// Requests to sync, in the last second, and what they took.
    pub syncs: u32,
    pub sync_mean_us: u32,
}

/// Role: admin (`Status` also client).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    Status,
    /// A one-time token for `role`, good for `valid_secs`.
    IssueToken {
        role: Role,
        valid_secs: u64,
    },
    /// Every invariant of the metadata, checked; at most 1000 sentences.
    Check,
    /// Compares what a storage server has of blocks whose hashes begin with `bucket` with what it is on record for. With `mend`, copies
    /// that are missing are taken off the record, so that others are made. Answered `Compared`.
    Compare {
        server: ServerId,
        bucket: u8,
        mend: bool,
    },
    /// Has every storage server that is up read and check all that it stores, from now on with no more breaks than
    /// whoever reads and writes meanwhile needs.
    Scrub,
    /// What is wanted of a storage server from now on. Answered `Done`, or `Declined` if that would endanger data.
    Stand {
        server: ServerId,
        standing: Standing,
    },
    /// Entries of the journal after this number, at most `JOURNAL_PAGE_MAX`, oldest first.
    Journal {
        after: u64,
    },
    /// Paths of files that name any of these blocks, at most `HASH_LIST_MAX`. Looks at every file.
    Names {
        blocks: Vec<BlockHash>,
    },
    /// The next part of a backup of the metadata: parts are asked for in order, the last one again if its answer was lost. `backup` is
    /// 0 to begin one, and then what the answer says.
    Backup {
        backup: u64,
        part: u32,
    },
    /// Has blocks moved until all servers are nearly equally full.
    Rebalance,
    /// So many copies from now on of what has no number of its own. Answered `Done`, or `Declined` if they cannot be had.
    SetReplicas {
        replicas: Replicas,
    },
    /// As `Stand`, whatever speaks against it. A server that is to leave, and is down, takes with it what nobody else has.
    StandDespite {
        server: ServerId,
        standing: Standing,
    },
    /// Blocks after this one that files name and that nobody is on record for. Looks at every block that is owed a copy.
    Lost {
        after: Option<BlockHash>,
    },
    /// Makes some of the rows again that follow from others and do not say what these say. Looks at everything.
    Mend,
}

/// Something that happened to the cluster, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Counted from 1.
    pub number: u64,
    pub time: Time,
    pub severity: Severity,
    /// The part of the cluster that it happened to.
    pub place: String,
    pub what: String,
    /// What that means for data and users; empty if nothing.
    pub consequence: String,
    /// What the system did, or does; empty if nothing.
    pub action: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Info,
    Warning,
    Error,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaReply {
    /// Changes with every start of the metadata server: a client that sees a new one sends `Reopen`.
    pub server_instance: u64,
    /// The newest cluster map's version: a client with an older one asks for it.
    pub map_version: u64,
    /// Everything up to here survives a power cut.
    pub durable_through: Position,
    /// Of the newest collection of garbage: what is put from now on is stamped with it, or with a later one.
    pub epoch: Epoch,
    pub result: Result<MetaAnswer, Refusal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaAnswer {
    Session {
        session: SessionId,
        renew_every_ms: u64,
    },
    /// Renew, Close, Opens, Barrier, Heartbeat, BadCopy.
    Done,
    Attr(Attr),
    Opened {
        attr: Attr,
        map: FileMap,
    },
    Link(Vec<u8>),
    /// With the directory's own parent if it was asked from the start; of the root, and of one that has been removed, itself. And its
    /// `data_version`.
    Directory {
        entries: Vec<DirEntry>,
        end: bool,
        parent: Option<Ino>,
        version: u64,
    },
    Bytes(Vec<u8>),
    Names(Vec<Vec<u8>>),
    Map(FileMap),
    Offset(u64),
    StatFs(StatFs),
    ClusterMap(ClusterMap),
    /// What a mutation did.
    Mutated {
        position: Position,
        outcome: Mutated,
    },
    Status(Box<ClusterStatus>),
    Token {
        secret: [u8; 32],
        ca_fingerprint: [u8; 32],
    },
    Violations(Vec<String>),
    /// `replay_after`: the server has lost its power, and with it what came after this position. Every mount sends
    /// `Replay`, also one that has nothing to say; until all have, or have been silent for too long, nothing else is answered.
    Reopened {
        replay_after: Option<Position>,
    },
    Replayed(Vec<Replayed>),
    /// Seek: there is none before this offset, which is past the one asked for; ask again from there.
    OffsetBeyond(u64),
    /// As `Mutated`, of a change of names, with the directories as they are now: the kernel asks for them next.
    MutatedIn {
        position: Position,
        outcome: Mutated,
        directories: Vec<Attr>,
        /// On those, and on one that it made.
        leases: Vec<Lease>,
    },
    Lock(LockAnswer),
    /// Files of which some lock could not be given back: somebody else has it by now.
    Relocked {
        lost: Vec<Ino>,
    },
    /// In order, each with its number.
    Events(Vec<(u64, Event)>),
    Compared(Comparison),
    /// Not done, for these reasons.
    Declined(Vec<String>),
    Journal(Vec<JournalEntry>),
    /// At most `PATHS_MAX`.
    Paths(Vec<LostPath>),
    /// Empty after the last part: all of it is durable where it was taken.
    BackupPart {
        backup: u64,
        bytes: Vec<u8>,
    },
    /// One for each change, in order. A refusal stands for itself.
    MutatedMany(Vec<Result<Changed, Refusal>>),
    /// `ReadDir`: the directory is at the version that the asker knows.
    Unchanged,
    /// At most `HASH_LIST_MAX`, in order.
    Blocks(Vec<BlockHash>),
    /// So much was found that follows from other rows and was wrong, and so much of it was made again: ask once more while it is
    /// any. The rest has changed meanwhile, or cannot be said by a program.
    Mended {
        found: u64,
        made: u64,
    },
}

/// A file that names a block, by one of its names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LostPath {
    /// From the root of the filesystem; empty: it has no name any more, and is open somewhere.
    pub path: Vec<u8>,
    pub ino: Ino,
    /// The first byte that is concerned.
    pub offset: u64,
}

/// What a comparison of one bucket has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Blocks that the server is on record for.
    pub on_record: u64,
    /// Of those, blocks that it does not have.
    pub missing: u64,
    /// Of those, blocks of which copies are made now. The rest has no other copy, or was not to be mended.
    pub mended: u64,
    /// Blocks that it has and is not on record for: put a moment ago, or left over, and then deleted in time.
    pub extra: u64,
    /// Of the missing, those that files name, with how many servers are on record for each: at most `LOST_MAX`.
    pub named: Vec<(BlockHash, u32)>,
}

/// The part of an answer to a mutation that is kept for I5.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mutated {
    /// Make, Link, SetAttr, CopyRange, Punch: the inode after it.
    /// Make with `exclusive: false` on a name that is taken: what is there, `created: false`.
    Inode { attr: Attr, created: bool },
    /// Unlink, Rmdir: what lost its name, after it (nlink 0: gone when nobody has it open).
    Removed { attr: Attr },
    /// Rename: what moved, and what was replaced by it (after losing that name).
    Renamed { moved: Attr, replaced: Option<Attr> },
    /// SetXattr, RemoveXattr, Accessed.
    Done,
    /// One for each file of the commit, in order.
    Committed(Vec<Result<Attr, Refusal>>),
}

/// What came of one change of many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    pub position: Position,
    pub outcome: Mutated,
    /// As in `MutatedIn`.
    pub directories: Vec<Attr>,
    pub leases: Vec<Lease>,
}

impl MetaAnswer {
    /// Attributes of inodes in it, as they were when it was made.
    pub fn attrs(&self) -> Vec<&Attr> {
        match self {
            Self::Attr(attr) | Self::Opened { attr, .. } => vec![attr],
            Self::Directory { entries, .. } => entries.iter().filter_map(|entry| entry.attr.as_ref()).collect(),
            Self::Mutated { outcome, .. } => outcome.attrs(),
            Self::MutatedIn { outcome, directories, .. } => outcome.attrs().into_iter().chain(directories).collect(),
            _ => Vec::new(),
        }
    }
}

impl Mutated {
    /// Attributes of inodes in it.
    pub fn attrs(&self) -> Vec<&Attr> {
        match self {
            Self::Inode { attr, .. } | Self::Removed { attr } => vec![attr],
            Self::Renamed { moved, replaced } => std::iter::once(moved).chain(replaced).collect(),
            Self::Committed(files) => files.iter().filter_map(|file| file.as_ref().ok()).collect(),
            Self::Done => Vec::new(),
        }
    }
}

/// Pieces of some chunks, and where their blocks are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMap {
    pub data_version: u64,
    /// In order; chunks without a piece are left out.
    pub chunks: Vec<(ChunkIndex, Vec<Piece>)>,
    /// Every block that `chunks` names, once, sorted by hash.
    pub blocks: Vec<BlockPlace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockPlace {
    pub hash: BlockHash,
    pub length: u32,
    pub holders: Vec<ServerId>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatFs {
    /// Bytes that could be stored, counted once however many copies there are.
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub inodes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub cluster: ClusterId,
    pub map_version: u64,
    pub servers: Vec<ServerStatus>,
    pub mounts: Vec<MountStatus>,
    pub inodes: u64,
    pub blocks: u64,
    /// Blocks by number of copies: `[0]` none, ... `[3]` three or more.
    pub blocks_by_copies: [u64; 4],
    /// Blocks that are owed a copy, but for those of which there is none.
    pub owed: u64,
    /// Copies made by the system since the cluster was made: owed ones paid, bad ones replaced.
    pub copies_made: u64,
    pub corrupt_copies_met: u64,
    pub missing_copies_met: u64,
    pub copies_repaired: u64,
    /// Blocks that no file names any more, and that are kept for a while.
    pub unnamed: u64,
    /// Blocks whose copies are being deleted.
    pub condemned: u64,
    /// Blocks whose copies have been deleted since the cluster was made.
    pub collected: u64,
    pub log_position: Position,
    pub durable_through: Position,
    /// When the metadata was last copied to storage servers, in seconds since 1970; 0: not since the server was started.
    pub backup_secs: i64,
    /// Bytes that are to be moved until all servers are nearly equally full, while that is being done.
    pub balance_left_bytes: u64,
    /// Copies that are kept of what has no number of its own.
    pub replicas: u64,
    /// How much of the metadata follows the numbers of copies that are wanted, in percent. At 100 no block has too many.
    pub replicas_followed_percent: u32,
    /// Seconds until no copy is owed any more, if they go on being made as in the last half minute; none: none was made.
    pub owed_secs: Option<u64>,
    /// Why the servers cannot be made equally full, though somebody wants them to be, or they should; empty: nothing hinders.
    pub balance_hindered: String,
    /// Bad copies that their servers have found, and in whose place there is no good one yet.
    pub bad_copies_waiting: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    pub id: ServerId,
    pub address: std::net::SocketAddr,
    pub zone: String,
    pub state: ServerState,
    pub weight: u32,
    /// Milliseconds since its last heartbeat.
    pub silent_ms: u64,
    pub boot: BootId,
    pub standing: Standing,
    /// While it is being emptied: blocks that it still is on record for. Known after the first look at all of them.
    pub left: Option<u64>,
    pub load: StorageLoad,
    /// Milliseconds since its state and its standing are what they are.
    pub since_ms: u64,
    /// Why they are so, in words; empty: it is as it should be.
    pub reason: String,
    /// While it is being emptied: why nothing can be moved now, in words; empty: nothing hinders.
    pub hindered: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    pub session: SessionId,
    pub host: String,
    pub mountpoint: String,
    pub silent_ms: u64,
    pub open_files: u64,
    pub dirty_bytes: u64,
    /// Bad copies that this mount had replaced.
    pub repairs: u64,
}
