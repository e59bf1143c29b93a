//! One mount in the kernel: made, served by several threads, and ended.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use fuser::{Config, MountOption, Session, SessionACL};
use tokio::runtime::Handle;

use super::{
    KernelNotifier,
    adapter::Adapter,
    dispatch::{Deadlines, Dispatcher},
};
use crate::{fs::Fs, sys};

const DEVICE: &str = "/dev/fuse";
/// Its numbers, on every Linux.
const DEVICE_NUMBERS: (u32, u32) = (10, 229);
/// What `/proc/mounts` shows after `fuse.`, and what `mount -t` is told.
const SUBTYPE: &str = "holdfast";
/// Read-ahead of the kernel's page cache for a mount, where it may be set: several blocks.
const READ_AHEAD_KIB: u32 = 4096;

/// What the kernel enforces about a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of mount(2)")]
pub struct MountFlags {
    pub read_only: bool,
    pub suid: bool,
    pub dev: bool,
    pub exec: bool,
    pub atime: bool,
    pub synchronous: bool,
    pub directories_synchronous: bool,
}

impl MountFlags {
    fn bits(self) -> libc::c_ulong {
        [
            (self.read_only, libc::MS_RDONLY),
            (!self.suid, libc::MS_NOSUID),
            (!self.dev, libc::MS_NODEV),
            (!self.exec, libc::MS_NOEXEC),
            (!self.atime, libc::MS_NOATIME),
            (self.synchronous, libc::MS_SYNCHRONOUS),
            (self.directories_synchronous, libc::MS_DIRSYNC),
        ]
        .into_iter()
        .filter(|(set, _)| *set)
        .fold(0, |bits, (_, bit)| bits | bit)
    }

    fn options(self) -> Vec<MountOption> {
        let mut options = vec![
            if self.read_only { MountOption::RO } else { MountOption::RW },
            if self.suid { MountOption::Suid } else { MountOption::NoSuid },
            if self.dev { MountOption::Dev } else { MountOption::NoDev },
            if self.exec { MountOption::Exec } else { MountOption::NoExec },
        ];
        options.extend((!self.atime).then_some(MountOption::NoAtime));
        options.extend(self.synchronous.then_some(MountOption::Sync));
        options.extend(self.directories_synchronous.then_some(MountOption::DirSync));
        options
    }
}

/// What to mount, where and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPlan {
    /// First column of `/proc/mounts`.
    pub source: String,
    /// Absolute, without symbolic links.
    pub mountpoint: PathBuf,
    pub flags: MountFlags,
    /// Users other than the one who mounts may use it.
    pub allow_other: bool,
    /// How long [`Fs`] itself tries before it gives up.
    pub io_timeout: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("{DEVICE} does not exist: load the kernel module with `modprobe fuse`, or give the container the device")]
    NoDevice,
    #[error("{DEVICE} cannot be opened")]
    Device { source: io::Error },
    #[error("{DEVICE} is something else than the kernel's FUSE device ({}:{})", DEVICE_NUMBERS.0, DEVICE_NUMBERS.1)]
    OtherDevice,
    #[error("{path} cannot be mounted on")]
    Mountpoint { path: PathBuf, source: io::Error },
    #[error("the kernel refuses to mount on {path}")]
    Kernel { path: PathBuf, source: io::Error },
    #[error("the kernel and this program could not agree on how to talk (FUSE handshake)")]
    Handshake { source: io::Error },
    #[error("the threads that answer the kernel could not be started")]
    Threads { source: io::Error },
}

/// A mount that is being served.
#[derive(Debug)]
pub struct KernelSession {
    mountpoint: PathBuf,
    notifier: KernelNotifier,
}

impl KernelSession {
    /// Mounts and serves until the kernel lets go of the mount; then `ended` is called, on a thread of its own.
    /// Operations that must wait run on `runtime`.
    pub fn start(
        fs: Arc<Fs>,
        runtime: &Handle,
        plan: &MountPlan,
        ended: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<Self, MountError> {
        let dispatcher = Dispatcher::new(runtime.clone(), Deadlines::past(plan.io_timeout));
        let session = open_session(Adapter::new(fs, dispatcher), plan)?;
        let notifier = KernelNotifier::new(session.notifier());
        thread::Builder::new()
            .name("fuse-session".to_owned())
            .spawn(move || ended(as_end(session.run())))
            .map_err(|source| MountError::Threads { source })?;
        Ok(Self { mountpoint: plan.mountpoint.clone(), notifier })
    }

    pub fn notifier(&self) -> KernelNotifier {
        self.notifier.clone()
    }

    /// Asks for the root through the kernel, and so proves that the mount answers. Then widens its read-ahead.
    /// Blocks; not for the runtime's thread.
    pub fn prove(&self) -> io::Result<()> {
        let device = fs::metadata(&self.mountpoint)?.dev();
        widen_read_ahead(device);
        Ok(())
    }

    pub fn unmount(&self, how: sys::Unmount) -> io::Result<()> {
        sys::unmount(&self.mountpoint, how)
    }
}

/// A mount that goes while a request is handed over answers with `ECONNABORTED` (fuser knows `ENODEV` alone): an end like any other.
fn as_end(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
        result => result,
    }
}

/// As root the mount is made here, so that its type is `fuse.holdfast`, and so that its end does not unmount
/// whatever has been mounted in its place since (fuser 0.18 would). Others need the setuid helper, through fuser.
fn open_session(adapter: Adapter, plan: &MountPlan) -> Result<Session<Adapter>, MountError> {
    let device = open_device()?;
    if sys::effective_uid() != 0 {
        drop(device);
        return Session::new(adapter, &plan.mountpoint, &config(plan))
            .map_err(|source| MountError::Kernel { path: plan.mountpoint.clone(), source });
    }
    mount_as_root(&device, plan)?;
    Session::from_fd(adapter, OwnedFd::from(device), acl(plan), config(plan)).map_err(|source| {
        abandon(&plan.mountpoint);
        MountError::Handshake { source }
    })
}

fn abandon(mountpoint: &Path) {
    if let Err(error) = sys::unmount(mountpoint, sys::Unmount::Lazy) {
        tracing::warn!(%error, mountpoint = %mountpoint.display(), "a mount that failed could not be taken away");
    }
}

/// `/dev/fuse`, open for both ways.
fn open_device() -> Result<File, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MountError::NoDevice,
        _ => MountError::Device { source },
    })?;
    let found = device.metadata().map_err(|source| MountError::Device { source })?;
    let is_fuse = found.file_type().is_char_device() && sys::device_numbers(found.rdev()) == DEVICE_NUMBERS;
    if is_fuse { Ok(device) } else { Err(MountError::OtherDevice) }
}

/// Fails as mounting would, when `/dev/fuse` is missing or closed to this user.
pub(crate) fn check_device() -> Result<(), MountError> {
    open_device().map(drop)
}

fn mount_as_root(device: &File, plan: &MountPlan) -> Result<(), MountError> {
    let path = &plan.mountpoint;
    let mode = fs::metadata(path)
        .map_err(|source| MountError::Mountpoint { path: path.clone(), source })?
        .permissions()
        .mode();
    let data = kernel_data(device.as_raw_fd(), mode, plan.allow_other);
    let request = sys::KernelMount {
        source: &plan.source,
        target: path,
        kind: &format!("fuse.{SUBTYPE}"),
        flags: plan.flags.bits(),
        data: &data,
    };
    sys::mount(&request).map_err(|source| MountError::Kernel { path: path.clone(), source })
}

/// The text that the fuse filesystem of the kernel takes as its own options.
fn kernel_data(device: i32, root_mode: u32, allow_other: bool) -> String {
    let (user, group) = (sys::effective_uid(), sys::effective_gid());
    let others = if allow_other { ",allow_other" } else { "" };
    format!("fd={device},rootmode={root_mode:o},user_id={user},group_id={group},default_permissions{others}")
}

fn acl(plan: &MountPlan) -> SessionACL {
    if plan.allow_other { SessionACL::All } else { SessionACL::Owner }
}

fn config(plan: &MountPlan) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(plan.source.clone()),
        MountOption::Subtype(SUBTYPE.to_owned()),
        MountOption::DefaultPermissions,
    ];
    config.mount_options.extend(plan.flags.options());
    config.acl = acl(plan);
    config.n_threads = Some(thread::available_parallelism().map_or(2, usize::from).max(2));
    config.clone_fd = true;
    config
}

fn widen_read_ahead(device: u64) {
    let (major, minor) = sys::device_numbers(device);
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::debug!(%error, path, "the kernel's read-ahead stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_flags() -> MountFlags {
        MountFlags {
            read_only: false,
            suid: true,
            dev: true,
            exec: true,
            atime: true,
            synchronous: false,
            directories_synchronous: false,
        }
    }

    #[test]
    fn a_mount_that_goes_while_a_request_is_handed_over_has_ended_and_not_failed() {
        let ends_with = |errno| as_end(Err(io::Error::from_raw_os_error(errno)));
        assert!(as_end(Ok(())).is_ok() && ends_with(libc::ECONNABORTED).is_ok());
        assert_eq!(ends_with(libc::EIO).expect_err("an error").raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn each_flag_is_its_bit_of_mount() {
        assert_eq!(open_flags().bits(), 0);
        assert_eq!(MountFlags { suid: false, dev: false, ..open_flags() }.bits(), libc::MS_NOSUID | libc::MS_NODEV);
        assert_eq!(MountFlags { read_only: true, ..open_flags() }.bits(), libc::MS_RDONLY);
        assert_eq!(MountFlags { exec: false, atime: false, ..open_flags() }.bits(), libc::MS_NOEXEC | libc::MS_NOATIME);
        let sync = MountFlags { synchronous: true, directories_synchronous: true, ..open_flags() };
        assert_eq!(sync.bits(), libc::MS_SYNCHRONOUS | libc::MS_DIRSYNC);
    }

    #[test]
    fn the_kernel_checks_permissions_and_others_come_in_only_when_asked_for() {
        let data = kernel_data(5, 0o40755, false);
        assert!(data.starts_with("fd=5,rootmode=40755,user_id="), "{data}");
        assert!(data.ends_with(",default_permissions"), "{data}");
        assert!(kernel_data(5, 0o40755, true).ends_with(",default_permissions,allow_other"));
    }
}
