//! A hard limit on the memory of a process that runs, by a control group of its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::wait;

/// Gone with the process, and at the latest with this.
#[derive(Debug)]
pub struct MemoryLimit {
    group: PathBuf,
    is_first_version: bool,
}

impl MemoryLimit {
    /// What `pid` takes from now on is at most `bytes`; past it the kernel takes its page cache, and kills it when that is not enough.
    /// An error: control groups cannot be made here.
    pub fn of(pid: u32, bytes: u64) -> io::Result<Self> {
        let first = Path::new("/sys/fs/cgroup/memory");
        let is_first_version = first.join("memory.limit_in_bytes").exists();
        let top = if is_first_version { first } else { Path::new("/sys/fs/cgroup") };
        if !is_first_version {
            fs::write(top.join("cgroup.subtree_control"), "+memory")?;
        }
        let group = top.join(format!("holdfast-test-{pid}"));
        fs::create_dir(&group)?;
        let limit = Self { group, is_first_version };
        let file = if is_first_version { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(limit.group.join(file), bytes.to_string())?;
        fs::write(limit.group.join("cgroup.procs"), pid.to_string())?;
        Ok(limit)
    }

    /// How often the kernel has killed for it.
    pub fn kills(&self) -> u64 {
        let file = if self.is_first_version { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.group.join(file)).expect("a control group tells what happened");
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).expect("it counts kills");
        line.trim().parse().expect("a number")
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Whoever is in it goes back to the top: its daemon may outlive this.
        let top = self.group.parent().expect("below the top").join("cgroup.procs");
        let left = || {
            for pid in fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines() {
                // It may have ended in this moment.
                let _ended = fs::write(&top, pid);
            }
            fs::remove_dir(&self.group).is_ok()
        };
        wait::try_until(Duration::from_secs(5), || left().then_some(()));
    }
}
