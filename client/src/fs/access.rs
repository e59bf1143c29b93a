//! Times of last access: noted in memory when a file is read, told to the metadata server once a second for all files.

use std::{collections::HashMap, time::Duration};

use holdfast_common::{Attr, Ino, Time, limits::ACCESSED_MAX, wire::meta::Op};
use parking_lot::Mutex;
use tracing::debug;

use super::{Fs, inode::Inode};

/// When a read is noted (mount(8)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessTimes {
    /// `noatime`.
    Never,
    /// `relatime`: when the file has changed since it was last read, or a day has passed.
    #[default]
    Relative,
    /// `strictatime`.
    Always,
}

/// After this an access is noted though nothing has changed.
const RELATIVE_AGE: i64 = 24 * 60 * 60;
pub(super) const TELL_EVERY: Duration = Duration::from_secs(1);

impl AccessTimes {
    /// Does an access `now` change what is remembered?
    pub fn is_due(self, attr: &Attr, now: Time) -> bool {
        match self {
            Self::Never => false,
            Self::Always => now > attr.atime,
            Self::Relative => {
                attr.atime <= attr.mtime || attr.atime <= attr.ctime || now.secs - attr.atime.secs >= RELATIVE_AGE
            }
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Accesses {
    times: AccessTimes,
    untold: Mutex<HashMap<Ino, Time>>,
}

impl Accesses {
    pub(super) fn new(times: AccessTimes) -> Self {
        Self { times, untold: Mutex::default() }
    }

    /// The attributes with accesses that the server has not heard of.
    pub(super) fn shown(&self, mut attr: Attr) -> Attr {
        if let Some(time) = self.untold.lock().get(&attr.ino) {
            attr.atime = attr.atime.max(*time);
        }
        attr
    }

    /// Somebody sets the time himself: what was read before does not count.
    pub(super) fn forget(&self, ino: Ino) {
        self.untold.lock().remove(&ino);
    }

    fn note(&self, ino: Ino, now: Time) {
        let mut untold = self.untold.lock();
        // Past the bound they are told late: the next read of the file notes it.
        if untold.len() < ACCESSED_MAX || untold.contains_key(&ino) {
            untold.insert(ino, now);
        }
    }
}

impl Fs {
    /// The file has been read.
    pub(super) fn note_access(&self, inode: &Inode) {
        if self.accesses.times == AccessTimes::Never {
            return;
        }
        let now = self.shared.clock.now();
        let attr = self.accesses.shown(inode.lock().attr());
        if self.accesses.times.is_due(&attr, now) {
            inode.lock().note_access(now);
            self.accesses.note(inode.ino, now);
        }
    }

    /// A directory has been listed, or a link followed. Whether that changes its time is for the server to say, which has it at hand.
    pub(super) fn note_listed(&self, ino: Ino) {
        if self.accesses.times != AccessTimes::Never {
            self.accesses.note(ino, self.shared.clock.now());
        }
    }

    /// Tells the server. What it cannot be told now is told with the next.
    pub(super) async fn tell_accesses(&self) {
        let files: Vec<(Ino, Time)> = self.accesses.untold.lock().iter().map(|(ino, time)| (*ino, *time)).collect();
        if files.is_empty() {
            return;
        }
        let always = self.accesses.times == AccessTimes::Always;
        match self.shared.meta.mutate(Op::Accessed { files: files.clone(), always }, false).await {
            Ok(_) => {
                let mut untold = self.accesses.untold.lock();
                for (ino, time) in files {
                    if untold.get(&ino) == Some(&time) {
                        untold.remove(&ino);
                    }
                }
            }
            Err(error) => debug!(?error, files = files.len(), "times of access could not be told yet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_common::Kind;

    fn attr(atime: i64, mtime: i64) -> Attr {
        let at = |secs| Time { secs, nanos: 0 };
        Attr { atime: at(atime), mtime: at(mtime), ctime: at(mtime), ..Attr::example(7, Kind::File) }
    }

    #[test]
    fn each_option_notes_what_mount_8_says() {
        let now = Time { secs: 100_000, nanos: 0 };
        let due = |times: AccessTimes, attr| times.is_due(&attr, now);
        for (read, changed, relative) in
            [(99_000, 98_000, false), (99_000, 99_000, true), (98_000, 99_000, true), (10_000, 9_000, true)]
        {
            assert_eq!(due(AccessTimes::Relative, attr(read, changed)), relative, "{read} {changed}");
            assert!(due(AccessTimes::Always, attr(read, changed)));
            assert!(!due(AccessTimes::Never, attr(read, changed)));
        }
    }
}
