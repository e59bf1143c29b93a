//! Directories as they were after a change of this mount: the kernel asks for their attributes right after it.

use std::{collections::HashMap, time::Duration};

use holdfast_common::{Attr, Ino};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How long an answer is kept for the question that follows. The kernel believes it for so much less than a second.
pub(super) const TOLD_LIFE: Duration = Duration::from_millis(50);
/// Directories past which all are forgotten.
const TOLD_MAX: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Told(Mutex<HashMap<Ino, (Attr, Instant)>>);

impl Told {
    pub(super) fn note(&self, directories: &[Attr]) {
        let mut told = self.0.lock();
        if told.len() + directories.len() > TOLD_MAX {
            told.clear();
        }
        told.extend(directories.iter().map(|attr| (attr.ino, (*attr, Instant::now()))));
    }

    /// The attributes, once, while they are new.
    pub(super) fn take(&self, ino: Ino) -> Option<Attr> {
        let (attr, at) = self.0.lock().remove(&ino)?;
        (at.elapsed() < TOLD_LIFE).then_some(attr)
    }

    /// The directory is about to be changed otherwise.
    pub(super) fn forget(&self, ino: Ino) {
        self.0.lock().remove(&ino);
    }

    pub(super) fn forget_all(&self) {
        self.0.lock().clear();
    }
}
