//! Listings of directories that the kernel keeps: at which version of the directory, and when it has to forget them.
//!
//! The kernel gathers a listing from the answers to one handle, if nothing comes between, and hands it out again to whoever opens the directory while
//! it is told that it may (FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE). This mount's own changes make it forget by itself. Of others' changes an `opendir` finds
//! out by the directory's version; who goes back to the beginning of an open directory does not ask, so a listing of
//! one that stays open is taken from the kernel after a while.

use std::{collections::HashMap, time::Duration};

use holdfast_common::Ino;
use parking_lot::Mutex;

/// What the kernel may hand out to who goes back in an open directory is no older than this and two ticks of the duties.
const OPEN_LIFE: Duration = Duration::from_millis(500);
/// Who lists a directory and then looks at each of its files is better served with a listing that has attributes, which the kernel does not keep.
const LOOKED_AT_LIFE: Duration = Duration::from_secs(60);
const DIRECTORIES_MAX: usize = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct Listings(Mutex<HashMap<Ino, Listing>>);

#[derive(Debug, Default)]
struct Listing {
    opens: u32,
    /// Opens that made the kernel throw away what it had.
    begun: u64,
    /// At which the kernel has a whole listing, unless it has thrown it away.
    version: Option<u64>,
    /// Since when an open handle may get to see what the kernel keeps.
    kept_since: Option<Duration>,
    looked_at: Option<Duration>,
}

/// What one handle has been answered since it was opened, or since its last look at the beginning.
#[derive(Debug)]
pub(super) struct Filling {
    /// `None`: the kernel does not gather a listing from this handle's answers alone.
    begun: Option<u64>,
    version: Option<u64>,
    /// It was opened with what the kernel had.
    keeps: bool,
}

impl Filling {
    /// A page of the directory at this version goes to the kernel.
    pub(super) fn note_page(&mut self, version: u64) {
        match self.version {
            Some(other) if other != version => self.begun = None,
            _ => self.version = Some(version),
        }
    }
}

impl Listings {
    /// The version at which the kernel has a listing that is worth keeping.
    pub(super) fn kept(&self, ino: Ino, now: Duration) -> Option<u64> {
        let listings = self.0.lock();
        let listing = listings.get(&ino)?;
        let is_looked_at = listing.looked_at.is_some_and(|at| now < at + LOOKED_AT_LIFE);
        listing.version.filter(|_| !is_looked_at)
    }

    /// A handle is opened; does the kernel keep what it has?
    pub(super) fn open(&self, ino: Ino, keeps: bool, now: Duration) -> Filling {
        let mut listings = self.0.lock();
        if listings.len() >= DIRECTORIES_MAX {
            listings.retain(|_, listing| listing.opens > 0);
        }
        let listing = listings.entry(ino).or_default();
        listing.opens += 1;
        listing.kept_since.get_or_insert(now);
        if keeps {
            return Filling { begun: None, version: None, keeps };
        }
        listing.begun += 1;
        listing.version = None;
        // Another handle's answers may go into the same listing.
        Filling { begun: (listing.opens == 1).then_some(listing.begun), version: None, keeps }
    }

    /// The handle has been told that there is no more.
    pub(super) fn end(&self, ino: Ino, filling: &Filling) {
        let mut listings = self.0.lock();
        let Some(listing) = listings.get_mut(&ino) else { return };
        if filling.begun == Some(listing.begun) {
            listing.version = filling.version;
        }
    }

    /// A handle asks from the beginning.
    pub(super) fn note_beginning(&self, ino: Ino, filling: &Filling, now: Duration) {
        if let Some(listing) = self.0.lock().get_mut(&ino).filter(|_| filling.keeps) {
            // So the kernel had nothing. It may not gather a listing of this directory any more: no use to compare for a while.
            (listing.version, listing.looked_at) = (None, Some(now));
        }
    }

    /// The kernel is told a part of the listing, and may keep it.
    pub(super) fn note_answer(&self, ino: Ino, now: Duration) {
        if let Some(listing) = self.0.lock().get_mut(&ino) {
            listing.kept_since.get_or_insert(now);
        }
    }

    pub(super) fn close(&self, ino: Ino) {
        let mut listings = self.0.lock();
        let Some(listing) = listings.get_mut(&ino) else { return };
        listing.opens -= 1;
        if listing.opens == 0 {
            listing.kept_since = None;
            if listing.version.is_none() && listing.looked_at.is_none() {
                listings.remove(&ino);
            }
        }
    }

    /// Files in the directory are looked at one after the other.
    pub(super) fn note_looked_at(&self, ino: Ino, now: Duration) {
        if let Some(listing) = self.0.lock().get_mut(&ino) {
            listing.looked_at = Some(now);
        }
    }

    /// The kernel has forgotten the directory.
    pub(super) fn forget(&self, ino: Ino) {
        let mut listings = self.0.lock();
        if listings.get(&ino).is_some_and(|listing| listing.opens == 0) {
            listings.remove(&ino);
        }
    }

    /// No version is what it was.
    pub(super) fn distrust(&self) {
        for listing in self.0.lock().values_mut() {
            // What is being gathered is of the past too.
            listing.begun += 1;
            listing.version = None;
        }
    }

    /// Open directories of which the kernel has to forget what it keeps, because it was true `age` ago.
    pub(super) fn take_open(&self, age: Duration, now: Duration) -> Vec<Ino> {
        let mut taken = Vec::new();
        for (ino, listing) in self.0.lock().iter_mut() {
            if listing.opens > 0 && listing.kept_since.is_some_and(|since| now >= since + age) {
                listing.begun += 1;
                (listing.version, listing.kept_since) = (None, None);
                taken.push(*ino);
            }
        }
        taken
    }

    pub(super) fn take_old(&self, now: Duration) -> Vec<Ino> {
        self.take_open(OPEN_LIFE, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Ino = Ino(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn fill(listings: &Listings, version: u64, now: Duration) {
        let mut filling = listings.open(HOME, false, now);
        filling.note_page(version);
        listings.end(HOME, &filling);
        listings.close(HOME);
    }

    #[test]
    fn a_listing_that_one_handle_was_told_whole_is_kept() {
        let listings = Listings::default();
        assert_eq!(listings.kept(HOME, ms(0)), None);
        fill(&listings, 7, ms(0));
        assert_eq!(listings.kept(HOME, ms(9000)), Some(7));
        let keeping = listings.open(HOME, true, ms(9000));
        listings.end(HOME, &keeping);
        listings.close(HOME);
        assert_eq!(listings.kept(HOME, ms(9000)), Some(7));
        // The kernel has lost it after all.
        let keeping = listings.open(HOME, true, ms(9000));
        listings.note_beginning(HOME, &keeping, ms(9000));
        listings.close(HOME);
        assert_eq!(listings.kept(HOME, ms(9000)), None);
        // Another begins, and is told only a part.
        let mut filling = listings.open(HOME, false, ms(9000));
        filling.note_page(8);
        listings.close(HOME);
        assert_eq!(listings.kept(HOME, ms(9000)), None);
    }

    #[test]
    fn what_two_handles_or_two_versions_went_into_is_not() {
        let listings = Listings::default();
        let mut one = listings.open(HOME, false, ms(0));
        one.note_page(7);
        let mut other = listings.open(HOME, false, ms(0));
        other.note_page(7);
        for filling in [&one, &other] {
            listings.end(HOME, filling);
            assert_eq!(listings.kept(HOME, ms(0)), None);
        }
        (0..2).for_each(|_| listings.close(HOME));
        let mut filling = listings.open(HOME, false, ms(0));
        filling.note_page(7);
        filling.note_page(8);
        listings.end(HOME, &filling);
        assert_eq!(listings.kept(HOME, ms(0)), None);
    }

    #[test]
    fn a_directory_that_stays_open_is_forgotten_after_a_while() {
        let listings = Listings::default();
        let mut filling = listings.open(HOME, false, ms(0));
        filling.note_page(7);
        listings.end(HOME, &filling);
        assert_eq!((listings.take_old(ms(499)), listings.kept(HOME, ms(499))), (vec![], Some(7)));
        assert_eq!((listings.take_old(ms(500)), listings.kept(HOME, ms(500))), (vec![HOME], None));
        assert_eq!(listings.take_old(ms(5000)), []);
        // What the kernel gathers when the handle goes back is as old as that.
        listings.note_answer(HOME, ms(5000));
        assert_eq!((listings.take_old(ms(5499)), listings.take_old(ms(5500))), (vec![], vec![HOME]));
        listings.end(HOME, &filling);
        assert_eq!(listings.kept(HOME, ms(5500)), None, "it may be of two times");
        listings.close(HOME);
        fill(&listings, 8, ms(6000));
        assert_eq!((listings.take_old(ms(9000)), listings.kept(HOME, ms(9000))), (vec![], Some(8)), "an open will ask");
    }

    #[test]
    fn files_that_are_looked_at_are_listed_with_their_attributes() {
        let listings = Listings::default();
        fill(&listings, 7, ms(0));
        listings.note_looked_at(HOME, ms(10));
        assert_eq!(listings.kept(HOME, ms(60_009)), None);
        assert_eq!(listings.kept(HOME, ms(60_010)), Some(7));
    }

    #[test]
    fn nothing_is_kept_of_another_life_of_the_server_or_of_the_kernels_inode() {
        let listings = Listings::default();
        let mut filling = listings.open(HOME, false, ms(0));
        filling.note_page(7);
        listings.distrust();
        listings.end(HOME, &filling);
        listings.close(HOME);
        assert_eq!(listings.kept(HOME, ms(0)), None);
        fill(&listings, 7, ms(0));
        listings.forget(HOME);
        assert_eq!(listings.kept(HOME, ms(0)), None);
    }

    #[test]
    fn there_is_a_bound() {
        let listings = Listings::default();
        for ino in 0..DIRECTORIES_MAX as u64 + 9 {
            let mut filling = listings.open(Ino(ino), false, ms(0));
            filling.note_page(7);
            listings.end(Ino(ino), &filling);
            listings.close(Ino(ino));
        }
        assert!(listings.0.lock().len() <= DIRECTORIES_MAX);
    }
}
