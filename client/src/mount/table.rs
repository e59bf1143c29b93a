//! What is mounted, as `/proc/self/mounts` says, and whether a directory can be mounted on.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

const KIND: &str = "fuse.holdfast";

/// One mount of Holdfast on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OurMount {
    pub source: String,
    pub mountpoint: PathBuf,
}

/// Every mount of Holdfast that this process can see.
pub fn our_mounts() -> io::Result<Vec<OurMount>> {
    Ok(parse(&fs::read("/proc/self/mounts")?))
}

/// Whether the topmost mount at `mountpoint` (absolute) is one of Holdfast.
pub fn is_ours(mountpoint: &Path) -> bool {
    our_mounts().is_ok_and(|mounts| mounts.iter().any(|mount| mount.mountpoint == mountpoint))
}

fn parse(table: &[u8]) -> Vec<OurMount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<OurMount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (source, mountpoint, kind) = (fields.next()?, fields.next()?, fields.next()?);
    (kind == KIND.as_bytes()).then(|| OurMount {
        source: String::from_utf8_lossy(&unescape(source)).into_owned(),
        mountpoint: PathBuf::from(OsString::from_vec(unescape(mountpoint))),
    })
}

/// Undoes the kernel's `\040` for a space, and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        match octal(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

fn octal(text: &[u8]) -> Option<u8> {
    let [b'\\', digits @ ..] = text.get(..4)? else { return None };
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

/// Why a directory cannot be mounted on.
#[derive(Debug, thiserror::Error)]
pub enum MountpointError {
    #[error("the mount point {0} does not exist: create it first")]
    Missing(PathBuf),
    #[error("the mount point {0} is not a directory")]
    NotDirectory(PathBuf),
    #[error("the mount point {0} is not empty: its files would be hidden")]
    NotEmpty(PathBuf),
    #[error("{0} is a mount of Holdfast already")]
    Mounted(PathBuf),
    #[error("an earlier mount on {0} has died: remove it with `umount -l {0}`")]
    Dead(PathBuf),
    #[error("the mount point {path} cannot be looked at")]
    Unreadable { path: PathBuf, source: io::Error },
}

/// The absolute path of `mountpoint`, if it can be mounted on.
pub fn check_mountpoint(mountpoint: &Path) -> Result<PathBuf, MountpointError> {
    let absolute = mountpoint.canonicalize().map_err(|error| unreadable(mountpoint, error))?;
    if is_ours(&absolute) {
        return Err(MountpointError::Mounted(absolute));
    }
    if !absolute.is_dir() {
        return Err(MountpointError::NotDirectory(absolute));
    }
    let mut entries = fs::read_dir(&absolute).map_err(|error| unreadable(&absolute, error))?;
    match entries.next() {
        None => Ok(absolute),
        Some(_) => Err(MountpointError::NotEmpty(absolute)),
    }
}

fn unreadable(path: &Path, source: io::Error) -> MountpointError {
    let path = path.to_owned();
    match (source.raw_os_error(), source.kind()) {
        (Some(libc::ENOTCONN), _) => MountpointError::Dead(path),
        (_, io::ErrorKind::NotFound) => MountpointError::Missing(path),
        (_, io::ErrorKind::NotADirectory) => MountpointError::NotDirectory(path),
        _ => MountpointError::Unreadable { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_ours_are_found_and_names_are_unescaped() {
        let table = b"/dev/sda1 / ext4 rw 0 0\n\
            /srv/a\\040b /mnt/with\\040space\\134x fuse.holdfast rw,nosuid 0 0\n\
            sshfs /mnt/s fuse.sshfs rw 0 0\n\
            plain /mnt/p fuse.holdfast ro 0 0\nbroken\n\n";
        let mount = |source: &str, mountpoint: &str| OurMount { source: source.into(), mountpoint: mountpoint.into() };
        assert_eq!(parse(table), [mount("/srv/a b", "/mnt/with space\\x"), mount("plain", "/mnt/p")]);
    }

    #[test]
    fn a_backslash_that_escapes_nothing_stays() {
        for (text, plain) in [("a\\", "a\\"), ("\\04", "\\04"), ("\\999", "\\999"), ("\\101", "A"), ("", "")] {
            assert_eq!(unescape(text.as_bytes()), plain.as_bytes(), "{text}");
        }
    }

    #[test]
    fn a_mountpoint_is_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("empty")).unwrap();
        fs::create_dir_all(path("full/x")).unwrap();
        fs::write(path("file"), "").unwrap();
        let link = path("link");
        std::os::unix::fs::symlink(path("empty"), &link).unwrap();

        let empty = path("empty").canonicalize().unwrap();
        assert_eq!(check_mountpoint(&path("empty")).unwrap(), empty);
        assert_eq!(check_mountpoint(&link).unwrap(), empty);
        assert!(matches!(check_mountpoint(&path("none")), Err(MountpointError::Missing(_))));
        assert!(matches!(check_mountpoint(&path("file")), Err(MountpointError::NotDirectory(_))));
        assert!(matches!(check_mountpoint(&path("file/x")), Err(MountpointError::NotDirectory(_))));
        assert!(matches!(check_mountpoint(&path("full")), Err(MountpointError::NotEmpty(_))));
    }
}
