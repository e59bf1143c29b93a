//! A mounted cluster, unmounted when it goes out of scope, also in a panic.

use std::{
    fs,
    io::Write,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crate::{process::Process, sys, wait};

/// A mount is ready, or refuses with a sentence, within this.
const MOUNT_LIMIT: Duration = Duration::from_secs(20);
/// A mount has flushed everything and ended within this.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    process: Process,
}

impl Mount {
    /// Mounts the cluster that `configuration` names on the new directory `path`.
    pub(crate) fn start(configuration: &Path, path: PathBuf, options: &[&str], log: PathBuf) -> Self {
        fs::create_dir_all(&path).expect("make a mount point");
        let configuration = configuration.to_str().expect("test paths are UTF-8");
        let target = path.to_str().expect("test paths are UTF-8").to_owned();
        let mut arguments = vec!["mount", configuration, &target, "-f"];
        for option in options {
            arguments.extend(["-o", option]);
        }
        let mount = Self { process: Process::new("mount", "holdfast", &arguments, log), path };
        mount.start_again();
        mount
    }

    /// Mounts again after [`Self::unmount`] or [`Self::kill`].
    pub fn start_again(&self) {
        self.process.start();
        wait::until("the mount answers", MOUNT_LIMIT, || {
            assert!(!self.process.has_ended(), "the mount ended by itself:\n{}", self.process.log());
            is_mounted(&self.path)
        });
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The path of `name` in the mount.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// `umount`, and back when the mount process has flushed and ended well.
    pub fn unmount(&self) {
        wait::until("umount succeeds", UNMOUNT_LIMIT, || sys::umount(&self.path, 0).is_ok());
        let status = self.process.wait(UNMOUNT_LIMIT);
        let status = status.unwrap_or_else(|| panic!("the mount still runs {UNMOUNT_LIMIT:?} after umount"));
        assert!(status.success(), "the mount ended with {status}:\n{}", self.process.log());
    }

    /// Unmounts and mounts again: nothing is left in any cache.
    pub fn remount(&self) {
        self.unmount();
        self.start_again();
    }

    /// `kill -9` of the mount process, and its mount point freed.
    pub fn kill(&self) {
        self.process.kill();
        detach(&self.path);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if thread::panicking() {
            self.process.print_log_tail();
        }
        let gentle = || (sys::umount(&self.path, 0).is_ok() || !is_mounted(&self.path)).then_some(());
        if self.process.is_started()
            && !thread::panicking()
            && wait::try_until(Duration::from_secs(5), gentle).is_some()
        {
            self.process.wait(Duration::from_secs(10));
        }
        detach(&self.path);
        self.process.kill();
    }
}

/// Takes the mount away from everyone, whatever still uses it; requests that wait fail.
pub fn detach(path: &Path) {
    if is_mounted(path) && sys::umount(path, libc::MNT_FORCE | libc::MNT_DETACH).is_err() {
        // A person has to know: the temporary directory cannot be removed.
        writeln!(std::io::stderr(), "{} stays mounted", path.display()).ok();
    }
}

/// Whether something is mounted right on `path`.
pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let path = path.as_os_str().as_bytes();
    table.split(|&byte| byte == b'\n').any(|line| line.split(|&byte| byte == b' ').nth(4) == Some(path))
}
