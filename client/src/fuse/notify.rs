//! Telling the kernel that something it remembers is no longer true.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt};

use fuser::INodeNo;
use holdfast_common::Ino;

use crate::fs::KernelCaches;

/// A way to the kernel's caches of one mount. Cheap to clone.
///
/// Must not be called from within an operation on the same inode or directory: the kernel may hold a lock
/// that the notification waits for. A task of its own is right.
#[derive(Clone, Debug)]
pub struct KernelNotifier {
    inner: fuser::Notifier,
}

impl KernelNotifier {
    pub(super) fn new(inner: fuser::Notifier) -> Self {
        Self { inner }
    }

    /// Attributes and all pages of `ino` are forgotten. Fine for an inode that the kernel does not know.
    pub fn inval_inode(&self, ino: Ino) -> io::Result<()> {
        self.inner.inval_inode(INodeNo(ino.0), 0, 0)
    }

    /// Attributes of `ino` are forgotten; its pages stay.
    pub fn inval_attributes(&self, ino: Ino) -> io::Result<()> {
        self.inner.inval_inode(INodeNo(ino.0), -1, 0)
    }

    /// What the kernel believes about `name` in `parent` is forgotten.
    pub fn inval_entry(&self, parent: Ino, name: &[u8]) -> io::Result<()> {
        self.inner.inval_entry(INodeNo(parent.0), OsStr::from_bytes(name))
    }
}

impl KernelCaches for KernelNotifier {
    fn attributes_changed(&self, ino: Ino) {
        // Attributes alone: no page is locked for it, so that it may be said from within an open of the same inode.
        match self.inval_attributes(ino) {
            Ok(()) => {}
            // The kernel does not know the inode, and so has nothing to forget.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::debug!(%ino, %error, "the kernel was not told that attributes changed"),
        }
    }

    fn name_changed(&self, parent: Ino, name: &[u8]) {
        match self.inval_entry(parent, name) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A directory that something is mounted in, or that is in use.
            Err(error) => tracing::debug!(%parent, %error, "the kernel keeps a name that has changed"),
        }
    }

    fn pages_changed(&self, ino: Ino) {
        match self.inval_inode(ino) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%ino, %error, "the kernel was not told that pages changed"),
        }
    }
}
