//! Who goes through a tree lists one directory after another, in the order in which their parent was listed: those that come next are
//! asked for ahead, a few at a time.
//!
//! What was asked for ahead is told only while it is as good as what would be asked for now ([`OPENED_LIFE`](super::directory)), and only
//! for as long as that pays: each listing that comes in vain makes it take longer rows of directories before more are asked for.

use std::collections::{HashMap, VecDeque};

use holdfast_common::Ino;

/// Listed directories whose subdirectories are remembered.
const LISTS_MAX: usize = 16;
/// Subdirectories that are remembered of each.
const DIRECTORIES_MAX: usize = 4096;
/// Asked for ahead of who goes through them.
const WINDOW: usize = 8;
/// Directories in a row that look like a walk.
const ROW: usize = 2;
/// With so much in vain it takes `ROW << VAIN_MAX` directories.
const VAIN_MAX: u32 = 6;
/// Listings that nobody has asked for yet.
const AHEAD_MAX: usize = 64;

/// `A`: what is on its way.
#[derive(Debug)]
pub(super) struct Walks<A> {
    lists: VecDeque<Siblings>,
    ahead: HashMap<Ino, A>,
    /// In the order in which they were asked for.
    order: VecDeque<Ino>,
    vain: u32,
}

#[derive(Debug)]
struct Siblings {
    parent: Ino,
    directories: Vec<Ino>,
    /// The one that comes next in a walk.
    next: usize,
    row: usize,
    /// Those before it have been asked for.
    asked: usize,
}

impl<A> Default for Walks<A> {
    fn default() -> Self {
        Self { lists: VecDeque::new(), ahead: HashMap::new(), order: VecDeque::new(), vain: 0 }
    }
}

impl<A> Walks<A> {
    /// A page of `parent` goes to the kernel, the first one or the one after the last: these of its entries are directories.
    pub(super) fn note_page(&mut self, parent: Ino, is_first: bool, directories: impl Iterator<Item = Ino>) {
        if let Some(known) = self.lists.iter_mut().find(|known| known.parent == parent && !is_first) {
            let room = DIRECTORIES_MAX - known.directories.len();
            known.directories.extend(directories.take(room));
            return;
        }
        self.lists.retain(|known| known.parent != parent);
        let directories: Vec<Ino> = directories.take(DIRECTORIES_MAX).collect();
        if is_first && directories.len() >= ROW {
            self.lists.truncate(LISTS_MAX - 1);
            self.lists.push_front(Siblings { parent, directories, next: 0, row: 0, asked: 0 });
        }
    }

    /// A directory is listed. Returns those that should be asked for ahead now.
    pub(super) fn note_listed(&mut self, ino: Ino) -> Vec<Ino> {
        let is_next = |siblings: &&mut Siblings| siblings.directories.get(siblings.next) == Some(&ino);
        let Some(siblings) = self.lists.iter_mut().find(is_next) else { return Vec::new() };
        (siblings.next, siblings.row) = (siblings.next + 1, siblings.row + 1);
        if siblings.row < ROW << self.vain {
            return Vec::new();
        }
        let from = siblings.asked.max(siblings.next);
        let to = (siblings.next + WINDOW).min(siblings.directories.len());
        siblings.asked = siblings.asked.max(to);
        let wanted = siblings.directories.get(from..to).unwrap_or_default().to_vec();
        wanted.into_iter().filter(|ino| !self.ahead.contains_key(ino)).collect()
    }

    /// It has been asked for. Returns what nobody has asked for for too long.
    pub(super) fn note_asked(&mut self, ino: Ino, answer: A) -> Option<A> {
        let before = self.ahead.insert(ino, answer);
        self.order.push_back(ino);
        let oldest = if self.order.len() > AHEAD_MAX { self.order.pop_front() } else { None };
        let dropped = oldest.and_then(|ino| self.ahead.remove(&ino)).or(before);
        if dropped.is_some() {
            self.note_vain();
        }
        dropped
    }

    /// Was this directory asked for ahead?
    pub(super) fn take(&mut self, ino: Ino) -> Option<A> {
        let found = self.ahead.remove(&ino)?;
        self.order.retain(|other| *other != ino);
        Some(found)
    }

    /// What was taken could be told.
    pub(super) fn note_used(&mut self) {
        self.vain = self.vain.saturating_sub(1);
    }

    /// What was taken is too old, or something has changed since.
    pub(super) fn note_vain(&mut self) {
        self.vain = (self.vain + 1).min(VAIN_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inos(numbers: impl IntoIterator<Item = u64>) -> Vec<Ino> {
        numbers.into_iter().map(Ino).collect()
    }

    fn walks(count: u64) -> Walks<u64> {
        let mut walks = Walks::default();
        walks.note_page(Ino(1), true, (10..10 + count).map(Ino));
        walks
    }

    fn list(walks: &mut Walks<u64>, ino: u64) -> Vec<Ino> {
        let wanted = walks.note_listed(Ino(ino));
        for ino in &wanted {
            assert_eq!(walks.note_asked(*ino, ino.0), None);
        }
        wanted
    }

    #[test]
    fn two_in_a_row_are_a_walk_and_the_next_ones_are_asked_for_once_each() {
        let mut walks = walks(20);
        assert_eq!(list(&mut walks, 10), []);
        assert_eq!(list(&mut walks, 11), inos(12..20));
        assert_eq!((walks.take(Ino(12)), walks.take(Ino(12)), walks.take(Ino(20))), (Some(12), None, None));
        walks.note_used();
        assert_eq!(list(&mut walks, 12), inos([20]));
        for ino in 13..30 {
            list(&mut walks, ino);
        }
        assert_eq!(list(&mut walks, 30), [], "that was all");
    }

    #[test]
    fn whoever_jumps_about_has_nothing_asked_for() {
        let mut walks = walks(20);
        for ino in [15, 12, 10, 19, 13, 99, 15] {
            assert_eq!(list(&mut walks, ino), [], "{ino}");
        }
        assert_eq!(list(&mut walks, 11), inos(12..20), "a walk may be interrupted");
    }

    #[test]
    fn walks_go_down_and_come_back() {
        let mut walks = walks(4);
        list(&mut walks, 10);
        walks.note_page(Ino(10), true, [40, 41, 42].map(Ino).into_iter());
        list(&mut walks, 40);
        assert_eq!(list(&mut walks, 41), inos([42]));
        assert_eq!(list(&mut walks, 11), inos([12, 13]));
    }

    #[test]
    fn a_directory_of_many_pages_is_one_row_and_a_rewound_one_begins_anew() {
        let mut walks = walks(2);
        walks.note_page(Ino(1), false, (12..14).map(Ino));
        list(&mut walks, 10);
        assert_eq!(list(&mut walks, 11), inos([12, 13]));
        walks.note_page(Ino(1), true, (10..14).map(Ino));
        assert_eq!(list(&mut walks, 12), []);
        walks.note_page(Ino(7), false, (70..90).map(Ino));
        assert_eq!((list(&mut walks, 70), list(&mut walks, 71)), (vec![], vec![]), "its beginning was not seen");
    }

    #[test]
    fn what_comes_in_vain_makes_it_rarer_and_what_is_used_more_frequent() {
        let mut walks = walks(1000);
        for _ in 0..3 {
            walks.note_vain();
        }
        let first = (10..).find(|ino| !list(&mut walks, *ino).is_empty());
        assert_eq!(first, Some(10 + 16 - 1), "sixteen in a row");
        (0..10).for_each(|_| walks.note_vain());
        walks.note_page(Ino(2), true, (2000..3000).map(Ino));
        let first = (2000..).find(|ino| !list(&mut walks, *ino).is_empty());
        assert_eq!(first, Some(2000 + 128 - 1), "but it is tried again");
        (0..6).for_each(|_| walks.note_used());
        walks.note_page(Ino(3), true, (4000..4010).map(Ino));
        assert_eq!((list(&mut walks, 4000), list(&mut walks, 4001).len()), (vec![], 8));
    }

    #[test]
    fn what_is_remembered_and_what_is_ahead_is_bounded() {
        let mut walks = Walks::default();
        for parent in 0..100 {
            walks.note_page(Ino(parent), true, (0..10_000).map(|n| Ino(1_000_000 * (parent + 1) + n)));
        }
        assert_eq!(walks.lists.len(), LISTS_MAX);
        assert!(walks.lists.iter().all(|known| known.directories.len() == DIRECTORIES_MAX));
        let dropped: Vec<u64> = (0..100).filter_map(|n| walks.note_asked(Ino(n), n)).collect();
        assert_eq!((walks.ahead.len(), dropped), (AHEAD_MAX, (0..36).collect::<Vec<u64>>()), "the oldest go");
    }
}
