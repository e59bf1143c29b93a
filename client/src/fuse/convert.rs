//! Between the kernel's words, as fuser says them, and the filesystem's. Pure.

use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};
use holdfast_common::{
    Attr, Ino, Kind, Time,
    locks::LockKind,
    wire::meta::{REPLICAS_ATTRIBUTE, RenameMode, SetTime, StatFs, XattrMode},
};

use crate::fs::{Errno, FsResult};

/// What `st_blksize` tells programs: they copy in buffers of this size.
const PREFERRED_IO_SIZE: u32 = 128 << 10;
/// The unit in which `statfs` counts, and the one that `st_blocks` counts in.
const STATFS_BLOCK_SIZE: u32 = 4096;
const STAT_BLOCK_SIZE: u64 = 512;

pub(super) fn ino(number: INodeNo) -> Ino {
    Ino(number.0)
}

pub(super) fn errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.0)
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind in the mode that mknod(2) was given. A mode without a kind means a regular file.
pub(super) fn kind_of_mode(mode: u32) -> FsResult<Kind> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Ok(Kind::File),
        libc::S_IFIFO => Ok(Kind::Fifo),
        libc::S_IFSOCK => Ok(Kind::Socket),
        libc::S_IFCHR => Ok(Kind::CharDevice),
        libc::S_IFBLK => Ok(Kind::BlockDevice),
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// Permission, setuid, setgid and sticky bits.
pub(super) fn permissions(mode: u32) -> u32 {
    mode & 0o7777
}

pub(super) fn attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.stored.div_ceil(STAT_BLOCK_SIZE),
        atime: attr.atime.into(),
        mtime: attr.mtime.into(),
        ctime: attr.ctime.into(),
        crtime: attr.btime.into(),
        kind: file_type(attr.kind),
        perm: u16::try_from(permissions(attr.mode)).unwrap_or_default(),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: PREFERRED_IO_SIZE,
        flags: 0,
    }
}

/// Stands for `.` and `..` in a page with attributes, where the kernel reads only number and kind.
pub(super) fn bare_directory(ino: Ino) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(ino.0),
        size: 0,
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind: FileType::Directory,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_IO_SIZE,
        flags: 0,
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(kernel_time(time)),
    }
}

/// Undoes fuser 0.18's reading of times before 1970: it takes the kernel's (-2 s, +0.8 s) for 2.8 s before
/// the epoch, where 1.2 s before is meant.
fn kernel_time(time: SystemTime) -> Time {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(_) => Time::from(time),
        Err(before) => {
            let distance = before.duration();
            Time { secs: distance.as_secs().cast_signed().wrapping_neg(), nanos: distance.subsec_nanos() }
        }
    }
}

/// renameat2(2)'s flags.
pub(super) fn rename_mode(flags: RenameFlags) -> FsResult<RenameMode> {
    const NO_REPLACE: u32 = libc::RENAME_NOREPLACE;
    const EXCHANGE: u32 = libc::RENAME_EXCHANGE;
    const WHITEOUT: u32 = libc::RENAME_WHITEOUT;
    match flags.bits() {
        0 => Ok(RenameMode::Replace),
        NO_REPLACE => Ok(RenameMode::NoReplace),
        EXCHANGE => Ok(RenameMode::Exchange),
        WHITEOUT => Ok(RenameMode::Whiteout),
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// setxattr(2)'s flags.
pub(super) fn xattr_mode(flags: i32) -> FsResult<XattrMode> {
    match flags {
        0 => Ok(XattrMode::Set),
        libc::XATTR_CREATE => Ok(XattrMode::Create),
        libc::XATTR_REPLACE => Ok(XattrMode::Replace),
        _ => Err(Errno(libc::EINVAL)),
    }
}

/// fcntl(2)'s types of locks; `None`: F_UNLCK.
pub(super) fn lock_kind(kind: i32) -> FsResult<Option<LockKind>> {
    match kind {
        libc::F_RDLCK => Ok(Some(LockKind::Shared)),
        libc::F_WRLCK => Ok(Some(LockKind::Exclusive)),
        libc::F_UNLCK => Ok(None),
        _ => Err(Errno(libc::EINVAL)),
    }
}

pub(super) fn lock_type(kind: LockKind) -> i32 {
    match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    }
}

/// Whether attributes of this name are kept. Of `system.*` only what the kernel obeys.
pub(super) fn xattr_is_kept(name: &[u8]) -> bool {
    let namespaces = [&b"user."[..], b"trusted.", b"security."];
    is_permission_list(name)
        || is_setting(name)
        || namespaces.iter().any(|namespace| name.starts_with(namespace) && name.len() > namespace.len())
}

/// Not an attribute of somebody's choice, but a switch of this filesystem. The kernel lets whoever may write to a file use it.
pub(super) fn is_setting(name: &[u8]) -> bool {
    name == REPLICAS_ATTRIBUTE.as_bytes()
}

pub(super) fn is_permission_list(name: &[u8]) -> bool {
    matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default")
}

/// What the caller may know of: `trusted.*` is for root.
pub(super) fn xattrs_shown(mut names: Vec<Vec<u8>>, uid: u32) -> Vec<Vec<u8>> {
    names.retain(|name| uid == 0 || !name.starts_with(b"trusted."));
    names
}

/// What to answer to a request for `value` into a buffer of `room` bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum XattrAnswer<'a> {
    /// The caller only wanted to know how much room it needs.
    Size(u32),
    Data(&'a [u8]),
}

pub(super) fn xattr_answer(value: &[u8], room: u32) -> FsResult<XattrAnswer<'_>> {
    let size = u32::try_from(value.len()).map_err(|_| Errno(libc::E2BIG))?;
    match room {
        0 => Ok(XattrAnswer::Size(size)),
        room if size <= room => Ok(XattrAnswer::Data(value)),
        _ => Err(Errno(libc::ERANGE)),
    }
}

/// listxattr(2)'s form: each name with a NUL after it.
pub(super) fn xattr_names(names: &[Vec<u8>]) -> Vec<u8> {
    names.iter().flat_map(|name| name.iter().copied().chain([0])).collect()
}

/// The figures of statvfs(3), in blocks of `STATFS_BLOCK_SIZE`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StatFsFigures {
    pub(super) blocks: u64,
    pub(super) free: u64,
    pub(super) files: u64,
    pub(super) files_free: u64,
    pub(super) block_size: u32,
}

/// Inodes have no limit of their own: as many are free as there is room for.
pub(super) fn statfs(figures: &StatFs) -> StatFsFigures {
    let unit = u64::from(STATFS_BLOCK_SIZE);
    let free = figures.free_bytes / unit;
    StatFsFigures {
        blocks: figures.capacity_bytes / unit,
        free,
        files: figures.inodes.saturating_add(free),
        files_free: free,
        block_size: STATFS_BLOCK_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use holdfast_common::Replicas;

    use super::*;

    fn a_file() -> Attr {
        let time = |secs, nanos| Time { secs, nanos };
        Attr {
            ino: Ino(7),
            kind: Kind::File,
            mode: 0o4755,
            uid: 1,
            gid: 2,
            nlink: 3,
            size: 1 << 40,
            stored: 513,
            rdev: 0,
            atime: time(1, 5),
            mtime: time(-2, 800_000_000),
            ctime: time(3, 0),
            btime: time(4, 0),
            data_version: 9,
            replicas: Replicas::INHERITED,
        }
    }

    #[test]
    fn a_sparse_file_shows_its_size_and_only_what_it_stores() {
        let shown = attr(&a_file());
        assert_eq!((shown.ino.0, shown.size, shown.blocks), (7, 1 << 40, 2));
        assert_eq!((shown.perm, shown.nlink, shown.uid, shown.gid), (0o4755, 3, 1, 2));
        assert_eq!(shown.kind, FileType::RegularFile);
        assert_eq!(shown.atime, SystemTime::UNIX_EPOCH + Duration::new(1, 5));
        assert_eq!(shown.mtime, SystemTime::UNIX_EPOCH - Duration::new(1, 200_000_000));
    }

    #[test]
    fn every_kind_that_mknod_can_make_survives_the_way_through_the_mode() {
        let cases = [
            (libc::S_IFREG, Kind::File),
            (0, Kind::File),
            (libc::S_IFIFO, Kind::Fifo),
            (libc::S_IFSOCK, Kind::Socket),
            (libc::S_IFCHR, Kind::CharDevice),
            (libc::S_IFBLK, Kind::BlockDevice),
        ];
        for (mode, kind) in cases {
            assert_eq!(kind_of_mode(mode | 0o644), Ok(kind), "{mode:o}");
        }
        assert_eq!(kind_of_mode(libc::S_IFDIR), Err(Errno(libc::EINVAL)));
    }

    #[test]
    fn times_before_1970_are_what_the_kernel_meant() {
        // What fuser makes of the kernel's seconds and nanoseconds.
        let as_fuser_says = |secs: u64, nanos| SystemTime::UNIX_EPOCH - Duration::new(secs, nanos);
        assert_eq!(set_time(TimeOrNow::Now), SetTime::Now);
        for (secs, nanos) in [(2_u64, 800_000_000), (1, 0), (5, 1)] {
            let expected = SetTime::At(Time { secs: -secs.cast_signed(), nanos });
            assert_eq!(set_time(TimeOrNow::SpecificTime(as_fuser_says(secs, nanos))), expected);
        }
        let later = SystemTime::UNIX_EPOCH + Duration::new(10, 3);
        assert_eq!(set_time(TimeOrNow::SpecificTime(later)), SetTime::At(Time { secs: 10, nanos: 3 }));
    }

    #[test]
    fn no_time_is_too_far_away_to_be_shown_or_set() {
        for (secs, nanos) in [(i64::MIN, 0), (i64::MIN, u32::MAX), (i64::MAX, u32::MAX), (0, 1_000_000_000)] {
            let time = Time { secs, nanos };
            let shown = attr(&Attr { atime: time, mtime: time, ctime: time, btime: time, ..a_file() });
            assert_eq!(Time::from(shown.mtime), Time { secs, nanos: nanos.min(999_999_999) });
        }
        let beginning = SystemTime::UNIX_EPOCH - Duration::from_secs(1 << 63);
        let expected = SetTime::At(Time { secs: i64::MIN, nanos: 0 });
        assert_eq!(set_time(TimeOrNow::SpecificTime(beginning)), expected);
    }

    #[test]
    fn rename_flags_are_known_or_invalid() {
        let mode = |bits| rename_mode(RenameFlags::from_bits_retain(bits));
        assert_eq!(mode(0), Ok(RenameMode::Replace));
        assert_eq!(mode(libc::RENAME_NOREPLACE), Ok(RenameMode::NoReplace));
        assert_eq!(mode(libc::RENAME_EXCHANGE), Ok(RenameMode::Exchange));
        assert_eq!(mode(libc::RENAME_WHITEOUT), Ok(RenameMode::Whiteout));
        for bits in
            [libc::RENAME_WHITEOUT | libc::RENAME_EXCHANGE, libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE, 1 << 20]
        {
            assert_eq!(mode(bits), Err(Errno(libc::EINVAL)), "{bits:#x}");
        }
    }

    #[test]
    fn a_buffer_of_size_zero_asks_for_the_size_and_a_small_one_is_out_of_range() {
        assert_eq!(xattr_answer(b"value", 0), Ok(XattrAnswer::Size(5)));
        assert_eq!(xattr_answer(b"value", 5), Ok(XattrAnswer::Data(b"value")));
        assert_eq!(xattr_answer(b"value", 100), Ok(XattrAnswer::Data(b"value")));
        assert_eq!(xattr_answer(b"value", 4), Err(Errno(libc::ERANGE)));
        assert_eq!(xattr_answer(b"", 0), Ok(XattrAnswer::Size(0)));
        assert_eq!(xattr_answer(b"", 1), Ok(XattrAnswer::Data(b"")));
    }

    #[test]
    fn names_of_attributes_end_with_nul() {
        assert_eq!(xattr_names(&[]), b"");
        assert_eq!(xattr_names(&[b"user.a".to_vec(), b"user.bc".to_vec()]), b"user.a\0user.bc\0");
    }

    #[test]
    fn attributes_are_kept_that_somebody_obeys_or_nobody_must() {
        for (name, kept) in [
            (&b"user.comment"[..], true),
            (b"trusted.x", true),
            (b"security.capability", true),
            (b"system.posix_acl_access", true),
            (b"system.other", false),
            (b"user.", false),
            (b"other", false),
        ] {
            assert_eq!(xattr_is_kept(name), kept, "{}", name.escape_ascii());
        }
    }

    #[test]
    fn trusted_attributes_are_listed_for_root_only() {
        let names = vec![b"trusted.a".to_vec(), b"user.b".to_vec()];
        assert_eq!(xattrs_shown(names.clone(), 0), names);
        assert_eq!(xattrs_shown(names, 9), [b"user.b".to_vec()]);
    }

    #[test]
    fn free_room_is_counted_in_blocks_rounded_down() {
        let shown = statfs(&StatFs { capacity_bytes: 1_000_000, free_bytes: 8191, inodes: 10 });
        let expected = StatFsFigures { blocks: 244, free: 1, files: 11, files_free: 1, block_size: 4096 };
        assert_eq!(shown, expected);
    }
}
