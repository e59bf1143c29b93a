//! Inodes that are known not to have the attributes that the kernel asks for again and again: lists of permissions at every
//! step of a path, and capabilities before every write.

use std::collections::HashMap;

use holdfast_common::{
    Attr, Ino,
    mode::{HAS_ACCESS_LIST, HAS_CAPABILITY, HAS_DEFAULT_LIST},
};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::inode::ATTRIBUTE_LIFE;

/// Inodes past which all are forgotten: what is asked for is asked soon after its attributes.
const KNOWN_MAX: usize = 32 << 10;

/// The attribute's flag, if it has one.
fn flag_of(name: &[u8]) -> Option<u32> {
    match name {
        b"system.posix_acl_access" => Some(HAS_ACCESS_LIST),
        b"system.posix_acl_default" => Some(HAS_DEFAULT_LIST),
        b"security.capability" => Some(HAS_CAPABILITY),
        _ => None,
    }
}

/// Does the kernel ask for it again and again?
pub(super) fn is_asked_often(name: &[u8]) -> bool {
    flag_of(name).is_some()
}

/// The modes of inodes, with their flags, for as long as attributes are believed.
#[derive(Debug, Default)]
pub(super) struct Plain {
    modes: Mutex<HashMap<Ino, (u32, Instant)>>,
}

impl Plain {
    pub(super) fn learn(&self, attr: &Attr) {
        let mut modes = self.modes.lock();
        if modes.len() >= KNOWN_MAX && !modes.contains_key(&attr.ino) {
            modes.clear();
        }
        modes.insert(attr.ino, (attr.mode, Instant::now()));
    }

    /// The inode is about to be given an attribute, or to lose one.
    pub(super) fn forget(&self, ino: Ino) {
        self.modes.lock().remove(&ino);
    }

    pub(super) fn forget_all(&self) {
        self.modes.lock().clear();
    }

    /// Is it known that the inode does not have this attribute?
    pub(super) fn lacks(&self, ino: Ino, name: &[u8]) -> bool {
        let Some(flag) = flag_of(name) else { return false };
        let known = self.modes.lock().get(&ino).copied();
        known.is_some_and(|(mode, at)| at.elapsed() < ATTRIBUTE_LIFE && mode & flag == 0)
    }
}
