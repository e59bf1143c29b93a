//! Every maximum of the system, tied together at compile time. Pure.

/// Bytes of one chunk of a file, and the most bytes one block can hold.
pub const BLOCK_SIZE_MAX: u32 = 1 << 20;
/// Bytes of one chunk: the span of a file that one row of `pieces` maps.
pub const CHUNK_SIZE: u64 = BLOCK_SIZE_MAX as u64;
/// Bytes of one group of the hash tree: the grain at which a part of a block can be verified.
pub const HASH_GROUP_SIZE: u32 = 16 << 10;
/// Bytes of one file: 4 PiB less one chunk, so that every chunk index fits in 32 bits.
pub const FILE_SIZE_MAX: u64 = (u32::MAX as u64) * CHUNK_SIZE;
/// Pieces of one chunk past which the client rewrites the chunk as one block.
pub const PIECES_PER_CHUNK_COMPACT: usize = 64;
/// Pieces of one chunk that a decoder accepts. A commit that would leave more is refused.
pub const PIECES_PER_CHUNK_MAX: usize = 1024;

/// Bytes of one name in a directory, as on every Linux filesystem.
pub const NAME_LENGTH_MAX: usize = 255;
/// Bytes of the target of a symbolic link (`PATH_MAX` less its NUL).
pub const SYMLINK_LENGTH_MAX: usize = 4095;
/// Bytes of the name of an extended attribute (`XATTR_NAME_MAX`).
pub const XATTR_NAME_LENGTH_MAX: usize = 255;
/// Bytes of the value of an extended attribute (`XATTR_SIZE_MAX`).
pub const XATTR_VALUE_LENGTH_MAX: usize = 64 << 10;
/// Bytes of all names that `listxattr` may return (`XATTR_LIST_MAX`).
pub const XATTR_LIST_LENGTH_MAX: usize = 64 << 10;
/// Names of one inode, as on ext4.
pub const LINK_COUNT_MAX: u32 = 65_000;

/// Copies of a block that a cluster keeps of which nobody has said otherwise.
pub const REPLICAS: usize = 3;
/// The most copies that can be asked for.
pub const REPLICAS_MAX: usize = 5;
/// Durable copies without which no write is acknowledged as durable, unless fewer are wanted.
pub const REPLICAS_MIN: usize = 2;

/// Bytes of the bincode header of one message, either way.
pub const HEADER_SIZE_MAX: usize = 4 << 20;
/// Raw bytes that may follow a header: a batch of small blocks, or one block with its tree.
pub const PAYLOAD_SIZE_MAX: usize = 4 << 20;
/// Blocks in one batch put.
pub const PUT_BATCH_MAX: usize = 256;
/// Servers that a block may be passed on to by the one that gets it.
pub const PASSED_ON_MAX: usize = 8;
/// Hashes in one question or answer about many blocks.
pub const HASH_LIST_MAX: usize = 16 << 10;
/// Entries in one page of `ReadDir`.
pub const READDIR_PAGE_MAX: usize = 4096;
/// Files in one commit.
pub const COMMIT_FILES_MAX: usize = 256;
/// Pieces in one commit, over all its files.
pub const COMMIT_PIECES_MAX: usize = 8192;
/// Changes in one `MutateMany`.
pub const MUTATIONS_MAX: usize = 256;
/// Replies kept for each session, so that a retried mutation gets its first answer (I5).
/// A client keeps fewer mutations than this in flight.
pub const REPLIES_KEPT_PER_SESSION: u64 = 4096;
/// Times of access in one message.
pub const ACCESSED_MAX: usize = 8192;
/// Locks in one message.
pub const RELOCK_MAX: usize = 16 << 10;
/// Locks of one file that a mount keeps without the server knowing them.
pub const DELEGATED_LOCKS_MAX: usize = 1024;
/// Events in one message: each may bring `FOREIGN_CHANGES_MAX` changes.
pub const EVENTS_MAX: usize = 1;
/// Changes of other mounts in one message.
pub const FOREIGN_CHANGES_MAX: usize = 4096;
/// Longer than any cache of names and attributes believes what it has.
pub const FOREIGN_SPAN: std::time::Duration = std::time::Duration::from_millis(1200);
/// How long a mount may answer for the names in a directory that it changes, from when it sent the change.
pub const DIRECTORY_LEASE: std::time::Duration = std::time::Duration::from_secs(1);
/// How long the metadata server waits for an event before it answers without one.
pub const LISTEN_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
/// Entries of the journal in one message.
pub const JOURNAL_PAGE_MAX: usize = 512;
/// Bytes of each text of an entry of the journal.
pub const JOURNAL_TEXT_MAX: usize = 1024;
/// Lost blocks that a comparison of one bucket names.
pub const LOST_MAX: usize = 1024;
/// Paths in one message.
pub const PATHS_MAX: usize = 512;
/// Bytes of a path in a message; a longer one is cut at its front.
pub const PATH_SHOWN_MAX: usize = 4096;
/// Storage servers in one cluster.
pub const STORAGE_SERVERS_MAX: usize = 4096;

const _: () = assert!(BLOCK_SIZE_MAX as usize + (64 << 10) <= PAYLOAD_SIZE_MAX);
const _: () = assert!(BLOCK_SIZE_MAX.is_multiple_of(HASH_GROUP_SIZE));
const _: () = assert!(PIECES_PER_CHUNK_COMPACT < PIECES_PER_CHUNK_MAX);
const _: () = assert!(HASH_LIST_MAX * 64 <= HEADER_SIZE_MAX);
const _: () = assert!(COMMIT_PIECES_MAX * 128 <= HEADER_SIZE_MAX);
const _: () = assert!(READDIR_PAGE_MAX * (NAME_LENGTH_MAX + 256) <= HEADER_SIZE_MAX);
const _: () = assert!(REPLICAS_MIN <= REPLICAS && REPLICAS <= REPLICAS_MAX);
const _: () = assert!(JOURNAL_PAGE_MAX * (4 * JOURNAL_TEXT_MAX + 128) <= HEADER_SIZE_MAX);
const _: () = assert!(PATHS_MAX * (PATH_SHOWN_MAX + 64) <= HEADER_SIZE_MAX);
const _: () = assert!(FOREIGN_CHANGES_MAX * (NAME_LENGTH_MAX + 32) <= HEADER_SIZE_MAX);
