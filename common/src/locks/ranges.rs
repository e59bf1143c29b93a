//! What one owner holds of one file: ranges that do not overlap, those of one kind that touch joined.

use std::collections::BTreeMap;

use super::{LockKind, LockRange};

/// By first byte: last byte, kind, and the process that took it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, (u64, LockKind, u32)>);

impl Ranges {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (LockRange, LockKind, u32)> + '_ {
        self.0.iter().map(|(&first, &(last, kind, pid))| (LockRange { first, last }, kind, pid))
    }

    pub(super) fn overlapping(&self, range: LockRange) -> impl Iterator<Item = (LockRange, LockKind, u32)> + '_ {
        // Only the last that begins before `range` can reach into it.
        let reaching = self.0.range(..range.first).next_back().filter(move |(_, (last, ..))| *last >= range.first);
        let within = self.0.range(range.first..=range.last);
        reaching.into_iter().chain(within).map(|(&first, &(last, kind, pid))| (LockRange { first, last }, kind, pid))
    }

    /// All of `range` becomes `what`, or free.
    pub(super) fn set(&mut self, range: LockRange, what: Option<(LockKind, u32)>) {
        let replaced: Vec<_> = self.overlapping(range).collect();
        for (old, kind, pid) in replaced {
            self.0.remove(&old.first);
            if old.first < range.first {
                self.0.insert(old.first, (range.first - 1, kind, pid));
            }
            if old.last > range.last {
                self.0.insert(range.last + 1, (old.last, kind, pid));
            }
        }
        if let Some((kind, pid)) = what {
            self.insert_joined(range, kind, pid);
        }
    }

    fn insert_joined(&mut self, range: LockRange, kind: LockKind, pid: u32) {
        let LockRange { mut first, mut last } = range;
        if let Some((&before, &(end, other, _))) = self.0.range(..first).next_back()
            && other == kind
            && end + 1 == first
        {
            self.0.remove(&before);
            first = before;
        }
        if let Some(&(end, other, _)) = self.0.get(&(last + 1))
            && other == kind
        {
            self.0.remove(&(last + 1));
            last = end;
        }
        self.0.insert(first, (last, kind, pid));
    }
}
