//! The closed list of answers that say no, each with its errno. Pure.

use serde::{Deserialize, Serialize};

/// A server's deliberate no: part of the protocol, and for mutations a replicated answer.
/// New ones are added at the end: the number is on the wire and on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error("no such file or directory")]
    NotFound,
    #[error("the name is taken")]
    Exists,
    #[error("not a directory")]
    NotDirectory,
    #[error("is a directory")]
    IsDirectory,
    #[error("the directory is not empty")]
    NotEmpty,
    #[error("the operation does not fit this kind of file, or its arguments are out of range")]
    Invalid,
    #[error("the name is too long")]
    NameTooLong,
    #[error("too many links")]
    TooManyLinks,
    #[error("the file would be too large")]
    FileTooLarge,
    #[error("not permitted")]
    NotPermitted,
    #[error("no such attribute")]
    NoAttribute,
    #[error("the attribute is too large")]
    TooLarge,
    #[error("the inode is gone")]
    Stale,
    #[error("no space is left on the storage servers")]
    NoSpace,
    #[error("not supported")]
    NotSupported,
    #[error("the file is busy")]
    Busy,
    #[error("the session is unknown or has expired")]
    SessionExpired,
    #[error("the role in the certificate does not allow this request")]
    WrongRole,
    #[error("a new block is named with fewer than two copies")]
    TooFewReplicas,
    #[error("a named block is not, or no longer, known")]
    UnknownBlock,
    #[error("the block is not on this server")]
    BlockMissing,
    #[error("the copy on this server is damaged")]
    BlockDamaged,
    #[error("the bytes do not match the hash they were sent under")]
    HashMismatch,
    #[error("the server is full")]
    ServerFull,
    #[error("the server cannot do this now; try again")]
    Unavailable,
    #[error("the server met a fault of its own and logged it")]
    Fault,
    #[error("the request could not be understood")]
    BadRequest,
    #[error("the token is unknown, used or expired")]
    BadToken,
    #[error("another cluster")]
    WrongCluster,
    #[error("cross-device link")]
    CrossDevice,
    #[error("whoever holds the lock waits for this one")]
    Deadlock,
    #[error("no more locks can be kept")]
    TooManyLocks,
    #[error("the block may have been deleted since it was put: it has to be put again, with the newest epoch")]
    BlockGone,
}

impl Refusal {
    /// What a program sees. No `_` arm: a new refusal must choose its errno to compile.
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Exists => libc::EEXIST,
            Self::NotDirectory => libc::ENOTDIR,
            Self::IsDirectory => libc::EISDIR,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::Invalid | Self::BadRequest => libc::EINVAL,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::TooManyLinks => libc::EMLINK,
            Self::FileTooLarge => libc::EFBIG,
            Self::NotPermitted => libc::EPERM,
            Self::NoAttribute => libc::ENODATA,
            Self::TooLarge => libc::E2BIG,
            Self::Stale => libc::ESTALE,
            Self::NoSpace | Self::ServerFull => libc::ENOSPC,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::Busy => libc::EBUSY,
            Self::WrongRole | Self::BadToken | Self::WrongCluster => libc::EACCES,
            Self::CrossDevice => libc::EXDEV,
            Self::Deadlock => libc::EDEADLK,
            Self::TooManyLocks => libc::ENOLCK,
            Self::SessionExpired
            | Self::TooFewReplicas
            | Self::UnknownBlock
            | Self::BlockGone
            | Self::BlockMissing
            | Self::BlockDamaged
            | Self::HashMismatch
            | Self::Unavailable
            | Self::Fault => libc::EIO,
        }
    }
}
