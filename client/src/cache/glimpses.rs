//! A program that looks up one name of a directory after the other is likely to look up the rest: after a few, the directory is listed, and the
//! names are told from memory for as long as the kernel would believe them had it been told them itself. Never that a name is not there: for
//! that this mount needs a lease (`cache::names`, which owns this). Time comes in.
//!
//! What this mount changes, or hears to be otherwise, is forgotten here, and what was listed meanwhile is not taken.

use std::{collections::HashMap, time::Duration};

use holdfast_common::{Attr, DirEntry, Ino};

/// For how long names are told: with the half that the kernel believes them then, no longer than what it is told fresh.
const LIFE: Duration = Duration::from_millis(450);
/// Names of one directory asked for within [`LIFE`] before it is listed.
const UNKNOWN_BEFORE_LISTING: u32 = 3;
const IN_FLIGHT_MAX: usize = 8;
const DIRECTORIES_MAX: usize = 1024;
const NAMES_MAX: usize = 16 << 10;

/// A directory that is being listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glimpse {
    pub directory: Ino,
    /// Changes of this mount before it.
    changes: u64,
}

/// What is known of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glimpsed {
    /// With its attributes as they were so long ago.
    Present(Attr, Duration),
    Unknown,
    /// As `Unknown`; and it is time to list the directory: [`Glimpses::put`] or [`Glimpses::give_up`] has to follow.
    WorthListing(Glimpse),
}

#[derive(Debug, Default)]
pub struct Glimpses {
    directories: HashMap<Ino, Directory>,
    attrs: HashMap<Ino, (Attr, Duration)>,
    names: usize,
    changes: u64,
    /// Directories that are being listed, and what has been heard of inodes since. `None`: this and that.
    in_flight: HashMap<Ino, HashMap<Ino, Option<Attr>>>,
}

#[derive(Debug, Default)]
struct Directory {
    names: HashMap<Box<[u8]>, Ino>,
    /// When the names were asked for.
    asked: Option<Duration>,
    /// Names that had to be asked for, since then.
    unknown: u32,
    unknown_since: Duration,
    is_too_large: bool,
}

impl Directory {
    fn is_fresh(&self, now: Duration) -> bool {
        self.asked.is_some_and(|asked| now < asked + LIFE)
    }

    /// One more name has to be asked for.
    fn is_worth_listing(&mut self, now: Duration) -> bool {
        if now >= self.unknown_since + LIFE {
            (self.unknown, self.unknown_since) = (0, now);
        }
        self.unknown += 1;
        self.unknown >= UNKNOWN_BEFORE_LISTING && !self.is_too_large && !self.is_fresh(now)
    }
}

impl Glimpses {
    pub fn look(&mut self, directory: Ino, name: &[u8], now: Duration) -> Glimpsed {
        if self.directories.len() >= DIRECTORIES_MAX && !self.directories.contains_key(&directory) {
            self.forget_all();
        }
        let known = self.directories.entry(directory).or_default();
        if known.is_fresh(now)
            && let Some((attr, asked)) = known.names.get(name).and_then(|ino| self.attrs.get(ino))
        {
            return Glimpsed::Present(*attr, now.saturating_sub(*asked));
        }
        let may_list = self.in_flight.len() < IN_FLIGHT_MAX && !self.in_flight.contains_key(&directory);
        if !known.is_worth_listing(now) || !may_list {
            return Glimpsed::Unknown;
        }
        self.in_flight.insert(directory, HashMap::new());
        Glimpsed::WorthListing(Glimpse { directory, changes: self.changes })
    }

    /// Entries of the directory, which were asked for at `asked`; are they all?
    pub fn put(&mut self, glimpse: Glimpse, entries: Vec<DirEntry>, are_all: bool, asked: Duration) {
        let Some(heard_of) = self.in_flight.remove(&glimpse.directory) else { return };
        if self.names + entries.len() > NAMES_MAX {
            self.forget_all();
        }
        self.forget(glimpse.directory);
        let mut known = Directory { asked: Some(asked), is_too_large: !are_all, ..Directory::default() };
        if glimpse.changes == self.changes {
            for DirEntry { name, attr, .. } in entries {
                // The listing itself has been heard.
                let is_as_heard = |attr: &Attr| heard_of.get(&attr.ino).is_none_or(|heard| *heard == Some(*attr));
                let Some(attr) = attr.filter(is_as_heard) else { continue };
                known.names.insert(name.into_boxed_slice(), attr.ino);
                self.attrs.insert(attr.ino, (attr, asked));
            }
        }
        self.names += known.names.len();
        self.directories.insert(glimpse.directory, known);
    }

    pub fn give_up(&mut self, glimpse: Glimpse) {
        self.in_flight.remove(&glimpse.directory);
    }

    /// How often this mount has begun or ended to change something.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// This mount begins or ends to change something in these directories, or somewhere else.
    pub fn note_change(&mut self, directories: &[Ino]) {
        self.changes += 1;
        directories.iter().for_each(|ino| self.forget(*ino));
    }

    /// The server has said this of an inode.
    pub fn note_heard(&mut self, attr: &Attr) {
        self.attrs.remove(&attr.ino);
        for heard_of in self.in_flight.values_mut() {
            let heard = heard_of.entry(attr.ino).or_insert(Some(*attr));
            *heard = heard.filter(|heard| heard == attr);
        }
    }

    /// The inode may be otherwise than it was listed.
    pub fn distrust_attr(&mut self, ino: Ino) {
        self.attrs.remove(&ino);
        self.in_flight.values_mut().for_each(|heard_of| heard_of.extend([(ino, None)]));
    }

    /// Everything may be otherwise.
    pub fn distrust(&mut self) {
        self.changes += 1;
        self.forget_all();
    }

    fn forget(&mut self, directory: Ino) {
        let Some(known) = self.directories.remove(&directory) else { return };
        self.names -= known.names.len();
        for ino in known.names.values() {
            self.attrs.remove(ino);
        }
    }

    fn forget_all(&mut self) {
        self.directories.clear();
        self.attrs.clear();
        self.names = 0;
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::Kind;

    use super::*;

    const HOME: Ino = Ino(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn entry(name: &str, ino: u64) -> DirEntry {
        let attr = Some(Attr::example(ino, Kind::File));
        DirEntry { cookie: ino, name: name.into(), ino: Ino(ino), kind: Kind::File, attr }
    }

    fn worth_listing(glimpses: &mut Glimpses, now: Duration) -> Glimpse {
        for _ in 1..UNKNOWN_BEFORE_LISTING {
            assert_eq!(glimpses.look(HOME, b"a", now), Glimpsed::Unknown);
        }
        match glimpses.look(HOME, b"a", now) {
            Glimpsed::WorthListing(glimpse) => glimpse,
            other => panic!("{other:?}"),
        }
    }

    fn is_told(glimpses: &mut Glimpses, name: &[u8], now: Duration) -> bool {
        matches!(glimpses.look(HOME, name, now), Glimpsed::Present(..))
    }

    fn listed() -> Glimpses {
        let mut glimpses = Glimpses::default();
        let glimpse = worth_listing(&mut glimpses, ms(1000));
        glimpses.put(glimpse, vec![entry("a", 11), entry("b", 12)], true, ms(1000));
        glimpses
    }

    #[test]
    fn the_rest_is_told_for_a_while_after_a_few_and_what_is_not_there_never() {
        let mut glimpses = listed();
        let b = Glimpsed::Present(Attr::example(12, Kind::File), ms(5));
        assert_eq!(glimpses.look(HOME, b"b", ms(1005)), b);
        for _ in 0..9 {
            assert_eq!(glimpses.look(HOME, b"c", ms(1005)), Glimpsed::Unknown, "it may have been made since");
        }
        let too_late = glimpses.look(HOME, b"b", ms(1450));
        assert!(matches!(too_late, Glimpsed::WorthListing(_)), "{too_late:?}");
        assert_eq!(glimpses.look(HOME, b"b", ms(1450)), Glimpsed::Unknown, "it is being listed");
    }

    #[test]
    fn a_few_names_now_and_then_are_not_worth_it() {
        let mut glimpses = Glimpses::default();
        for now in 0..20 {
            assert_eq!(glimpses.look(HOME, b"a", ms(300 * now)), Glimpsed::Unknown);
        }
    }

    #[test]
    fn what_this_mount_changes_is_forgotten_also_while_it_is_listed() {
        let mut glimpses = listed();
        glimpses.note_heard(&Attr::example(12, Kind::File));
        assert!(is_told(&mut glimpses, b"a", ms(1001)) && !is_told(&mut glimpses, b"b", ms(1001)));
        glimpses.note_change(&[Ino(2)]);
        assert!(is_told(&mut glimpses, b"a", ms(1001)), "that was elsewhere");
        glimpses.note_change(&[HOME]);
        assert!(!is_told(&mut glimpses, b"a", ms(1001)));

        let mut glimpses = Glimpses::default();
        let glimpse = worth_listing(&mut glimpses, ms(1000));
        let entries = vec![entry("a", 11), entry("b", 12), entry("c", 13)];
        glimpses.note_heard(&Attr { mode: 0, ..Attr::example(12, Kind::File) });
        glimpses.distrust_attr(Ino(13));
        // As the listing's answer is.
        entries.iter().filter_map(|entry| entry.attr.as_ref()).for_each(|attr| glimpses.note_heard(attr));
        glimpses.put(glimpse, entries, true, ms(1000));
        let told = [b"a", b"b", b"c"].map(|name| is_told(&mut glimpses, name, ms(1001)));
        assert_eq!(told, [true, false, false], "which of what was heard of b is newer is not known");

        let mut glimpses = Glimpses::default();
        let glimpse = worth_listing(&mut glimpses, ms(1000));
        glimpses.note_change(&[]);
        glimpses.put(glimpse, vec![entry("a", 11)], true, ms(1000));
        assert!(!is_told(&mut glimpses, b"a", ms(1001)), "it may have been listed before the change");

        let mut glimpses = listed();
        glimpses.distrust();
        assert!(!is_told(&mut glimpses, b"a", ms(1001)));
    }

    #[test]
    fn a_directory_that_is_too_large_is_listed_once() {
        let mut glimpses = Glimpses::default();
        let glimpse = worth_listing(&mut glimpses, ms(1000));
        glimpses.put(glimpse, vec![entry("b", 12)], false, ms(1000));
        assert!(is_told(&mut glimpses, b"b", ms(1001)));
        for now in 0..2000 {
            assert!(!matches!(glimpses.look(HOME, b"a", ms(1001 + now)), Glimpsed::WorthListing(_)));
        }
    }

    #[test]
    fn one_that_could_not_be_listed_is_tried_again() {
        let mut glimpses = Glimpses::default();
        let glimpse = worth_listing(&mut glimpses, ms(1000));
        glimpses.give_up(glimpse);
        assert!(matches!(glimpses.look(HOME, b"a", ms(1001)), Glimpsed::WorthListing(_)));
    }

    #[test]
    fn there_are_bounds() {
        let mut glimpses = Glimpses::default();
        for directory in 0..3 * DIRECTORIES_MAX as u64 {
            for _ in 0..UNKNOWN_BEFORE_LISTING {
                if let Glimpsed::WorthListing(glimpse) = glimpses.look(Ino(directory), b"a", ms(1000)) {
                    let entries = (0..100).map(|n| entry(&n.to_string(), 100 * directory + n)).collect();
                    glimpses.put(glimpse, entries, true, ms(1000));
                }
            }
            let names: usize = glimpses.directories.values().map(|known| known.names.len()).sum();
            assert_eq!(names, glimpses.names);
            assert!(names <= NAMES_MAX && glimpses.attrs.len() <= NAMES_MAX);
            assert!(glimpses.directories.len() <= DIRECTORIES_MAX);
        }
    }
}
