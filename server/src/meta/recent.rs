//! What mounts have changed a moment ago, for others that must not believe their caches any more. Pure: time comes in.

use std::{collections::BTreeSet, collections::VecDeque, time::Duration};

use holdfast_common::{
    Position, Refusal, SessionId,
    limits::{FOREIGN_CHANGES_MAX, FOREIGN_SPAN},
    wire::meta::{Change, Foreign, Mutated, Op, Reach},
};

/// Entries kept: bounds this server's memory to some MiB.
const ENTRIES_MAX: usize = 32 << 10;

#[derive(Debug)]
struct Entry {
    position: Position,
    at: Duration,
    session: SessionId,
    changes: Vec<Change>,
}

#[derive(Debug)]
pub struct Recent {
    entries: VecDeque<Entry>,
    /// Every change after this position, and after this time, is in `entries`.
    complete_after: (Position, Duration),
    through: Position,
}

impl Recent {
    pub fn new(applied: Position, now: Duration) -> Self {
        Self { entries: VecDeque::new(), complete_after: (applied, now), through: applied }
    }

    /// In the order of their positions.
    pub fn note(&mut self, position: Position, session: SessionId, changes: Vec<Change>, now: Duration) {
        self.through = position;
        if changes.is_empty() {
            return;
        }
        if self.entries.len() >= ENTRIES_MAX
            && let Some(oldest) = self.entries.pop_front()
        {
            self.complete_after = (oldest.position, oldest.at);
        }
        self.entries.push_back(Entry { position, at: now, session, changes });
    }

    /// What others than `session` have changed after `since`.
    pub fn foreign(&self, session: SessionId, since: Position, now: Duration) -> Foreign {
        let recent_after = now.saturating_sub(FOREIGN_SPAN);
        let mut changes = BTreeSet::new();
        let mut reach = if self.complete_after.0 <= since { Reach::Complete } else { Reach::Nothing };
        let is_recent_whole = self.complete_after.1 <= recent_after;
        for entry in self.entries.iter().rev().take_while(|entry| entry.position > since) {
            if changes.len() + entry.changes.len() > FOREIGN_CHANGES_MAX {
                reach = if entry.at < recent_after { Reach::Recent } else { Reach::Nothing };
                return Foreign { through: self.through, changes: changes.into_iter().collect(), reach };
            }
            if entry.session != session {
                changes.extend(entry.changes.iter().cloned());
            }
        }
        if reach == Reach::Nothing && is_recent_whole {
            reach = Reach::Recent;
        }
        Foreign { through: self.through, changes: changes.into_iter().collect(), reach }
    }
}

/// What a mutation has changed that somebody may have cached.
pub fn changes_of(op: &Op, outcome: &Mutated) -> Vec<Change> {
    let mut changes: Vec<Change> = op.directories().into_iter().map(Change::Inode).collect();
    let name = |parent: &holdfast_common::Ino, name: &[u8]| Change::Name(*parent, name.to_vec());
    match op {
        Op::Make { parent, name: n, .. }
        | Op::Place { parent, name: n, .. }
        | Op::PlaceOpen { parent, name: n, .. }
        | Op::Link { parent, name: n, .. }
        | Op::Unlink { parent, name: n }
        | Op::Rmdir { parent, name: n }
        | Op::Remove { parent, name: n, .. } => changes.push(name(parent, n)),
        Op::Rename { from, from_name, to, to_name, .. } => {
            changes.extend([name(from, from_name), name(to, to_name)]);
        }
        Op::SetXattr { ino, .. } | Op::RemoveXattr { ino, .. } => changes.push(Change::Inode(*ino)),
        // Who has read a file has not changed it.
        Op::Accessed { .. } => {}
        // Nothing leads to it that could be in a cache.
        Op::MakeUnnamed { .. } => {}
        Op::Commit { .. } | Op::Append { .. } | Op::SetAttr { .. } | Op::CopyRange { .. } | Op::Punch { .. } => {}
    }
    match outcome {
        Mutated::Inode { attr, created: false } | Mutated::Removed { attr } => changes.push(Change::Inode(attr.ino)),
        Mutated::Renamed { moved, replaced } => {
            changes.extend([Some(*moved), *replaced].into_iter().flatten().map(|attr| Change::Inode(attr.ino)));
        }
        Mutated::Committed(files) => {
            let attrs = files.iter().filter_map(|file: &Result<_, Refusal>| file.as_ref().ok());
            changes.extend(attrs.map(|attr| Change::Inode(attr.ino)));
        }
        // What is new is in no cache, except as a name.
        Mutated::Inode { created: true, .. } | Mutated::Done => {}
    }
    changes
}

#[cfg(test)]
mod tests {
    use holdfast_common::Ino;

    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn inode(number: u64) -> Vec<Change> {
        vec![Change::Inode(Ino(number))]
    }

    #[test]
    fn only_what_others_did_after_that_is_told() {
        let mut recent = Recent::new(Position(10), at(0));
        recent.note(Position(11), A, inode(1), at(1));
        recent.note(Position(12), B, inode(2), at(1));
        recent.note(Position(13), A, inode(3), at(1));
        let foreign = |session, since| recent.foreign(session, Position(since), at(9));
        let expected = Foreign { through: Position(13), changes: inode(2), reach: Reach::Complete };
        assert_eq!(foreign(A, 10), expected);
        assert_eq!(foreign(B, 11).changes, inode(3));
        assert_eq!(foreign(A, 12).changes, []);
    }

    #[test]
    fn what_reaches_back_far_enough_in_time_is_enough_for_caches_that_expire() {
        let recent = Recent::new(Position(10), at(100));
        let reach = |since, now| recent.foreign(A, Position(since), now).reach;
        assert_eq!(reach(9, at(100)), Reach::Nothing);
        assert_eq!(reach(9, at(101) + at(1)), Reach::Recent);
        assert_eq!(reach(10, at(100)), Reach::Complete);
    }

    #[test]
    fn what_is_too_much_is_cut_at_the_old_end() {
        let mut recent = Recent::new(Position(0), at(0));
        let count = FOREIGN_CHANGES_MAX as u64 + 10;
        for number in 1..=count {
            recent.note(Position(number), B, inode(number), at(1));
        }
        let foreign = recent.foreign(A, Position(0), at(1));
        assert_eq!((foreign.changes.len(), foreign.reach), (FOREIGN_CHANGES_MAX, Reach::Nothing));
        assert!(foreign.changes.contains(&Change::Inode(Ino(count))));
        assert_eq!(recent.foreign(A, Position(0), at(9)).reach, Reach::Recent);
        assert_eq!(recent.foreign(B, Position(0), at(1)).reach, Reach::Complete);
    }

    #[test]
    fn memory_is_bounded_and_what_was_forgotten_is_known_to_be() {
        let mut recent = Recent::new(Position(0), at(0));
        for number in 1..=ENTRIES_MAX as u64 + 5 {
            recent.note(Position(number), A, inode(7), at(number));
        }
        assert_eq!(recent.entries.len(), ENTRIES_MAX);
        assert_eq!(recent.complete_after, (Position(5), at(5)));
        assert_eq!(recent.foreign(A, Position(4), at(ENTRIES_MAX as u64)).reach, Reach::Recent);
    }
}
