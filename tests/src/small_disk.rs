//! A small filesystem of its own, which can be filled without harm to anyone else.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use crate::{mount, shell};

/// Mounted where it was asked for, gone with this guard. Only root can make one.
#[derive(Debug)]
pub struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    /// One of `mebibytes` at `path`, which is made if it is not there.
    pub fn mount(path: &'a Path, mebibytes: u32) -> Self {
        fs::create_dir_all(path).expect("make a mount point");
        shell::run(Path::new("/"), &format!("mount -t tmpfs -o size={mebibytes}m tmpfs {}", path.display()));
        Self(path)
    }

    /// Others fill it to the last page, until the guard goes.
    pub fn fill(&self) -> Filler {
        let path = self.0.join("filler");
        let mut file = File::create(&path).expect("create");
        while file.write(&[0; 1 << 20]).is_ok_and(|written| written > 0) {}
        // A server may give back what it keeps for this meanwhile: that is not taken from it.
        (0..256).take_while(|_| file.write(&[0; 4096]).is_ok_and(|written| written > 0)).for_each(drop);
        Filler(path)
    }
}

/// Takes all the room of a disk.
#[derive(Debug)]
pub struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        // The disk may have gone before.
        fs::remove_file(&self.0).ok();
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        mount::detach(self.0);
    }
}
