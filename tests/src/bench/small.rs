//! Many small files, on a few threads: each has directories of its own. Every file's content is another, so that nothing can be
//! stored once for several.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::fault::random_bytes;

/// A tree of small files.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) root: PathBuf,
    pub(super) directories: usize,
    pub(super) files: usize,
    pub(super) size: usize,
    pub(super) threads: usize,
    pub(super) seed: u64,
}

/// What is done to each file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Create {
        fsync: bool,
    },
    Stat,
    Read,
    Rename,
    /// After `Rename`.
    Unlink,
}

impl Tree {
    pub(super) fn make_directories(&self) -> Result<()> {
        fs::create_dir(&self.root)?;
        (0..self.directories).try_for_each(|number| fs::create_dir(self.directory(number)))?;
        Ok(())
    }

    fn directory(&self, number: usize) -> PathBuf {
        self.root.join(format!("directory-{number:03}"))
    }

    /// A thread's directories are every `threads`-th, its files lie in them one directory after the other.
    fn file(&self, thread: usize, index: usize) -> PathBuf {
        let (files, directories) = (self.files / self.threads, self.directories / self.threads);
        let in_each = files.div_ceil(directories.max(1));
        self.directory(thread + self.threads * (index / in_each)).join(format!("file-{index:06}"))
    }

    /// How many files each thread does `act` to in a second, all threads together, and how many the slowest came to before `limit`.
    pub(super) fn run(&self, act: Act, each: usize, limit: Duration) -> Result<(f64, usize)> {
        let barrier = Barrier::new(self.threads);
        let begun = Instant::now();
        let done: Result<Vec<usize>> = thread::scope(|scope| {
            let work = |thread: usize| {
                barrier.wait();
                let until = Instant::now() + limit;
                for index in 0..each {
                    if index % 16 == 0 && Instant::now() >= until {
                        return Ok(index);
                    }
                    let path = self.file(thread, index);
                    self.act(act, &path, thread * self.files + index)
                        .with_context(|| format!("{act:?} {}", path.display()))?;
                }
                Ok(each)
            };
            let threads: Vec<_> = (0..self.threads).map(|thread| scope.spawn(move || work(thread))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread does not panic")).collect()
        });
        let (done, took) = (done?, begun.elapsed());
        let total: usize = done.iter().sum();
        Ok((total as f64 / took.as_secs_f64(), done.into_iter().min().unwrap_or(0)))
    }

    fn act(&self, act: Act, path: &Path, number: usize) -> Result<()> {
        match act {
            Act::Create { fsync } => {
                let content = random_bytes(self.seed.wrapping_mul(1_000_003) + number as u64, self.size);
                let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
                file.write_all(&content)?;
                if fsync {
                    file.sync_all()?;
                }
            }
            Act::Stat => ensure!(fs::symlink_metadata(path)?.len() == self.size as u64, "another size"),
            Act::Read => {
                let mut bytes = Vec::with_capacity(self.size + 1);
                File::open(path)?.read_to_end(&mut bytes)?;
                ensure!(bytes.len() == self.size, "another size");
            }
            Act::Rename => fs::rename(path, path.with_extension("renamed"))?,
            Act::Unlink => fs::remove_file(path.with_extension("renamed"))?,
        }
        Ok(())
    }
}

/// Makes and removes `count` directories in `root`, one after the other: of each, how many in a second.
pub(super) fn directories(root: &Path, count: usize) -> Result<(f64, f64)> {
    let rate = |act: &dyn Fn(PathBuf) -> std::io::Result<()>| -> Result<f64> {
        let began = Instant::now();
        (0..count).try_for_each(|number| act(root.join(format!("made-{number:06}"))))?;
        Ok(count as f64 / began.elapsed().as_secs_f64())
    };
    Ok((rate(&|path| fs::create_dir(path))?, rate(&|path| fs::remove_dir(path))?))
}
