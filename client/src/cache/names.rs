//! Names in directories that this mount has leases on (`server/meta/leases` has the other half): which there are, and in a directory that is known
//! whole, that there are no others. Time comes in, by a clock that no suspension stops.
//!
//! What is known is what a lease's number stands for: nobody else has changed the directory since. So it outlives the lease, which says
//! for how long it may be *used*; it ends when another number comes. The mount's own changes are entered in the order of their positions, however
//! their answers overtake each other.
//!
//! In a directory that this mount has for itself, names may be made and taken away before the server knows ([`Names::make_ahead`],
//! [`Names::remove_ahead`]): whoever does so sees to it that the server hears of it before anything that could be seen to come later. So may they in what was
//! made there: nobody else knows of that.
//!
//! Attributes are not leased. They come with the names and are as old as they are; whoever is told them hears how old.

use std::{collections::HashMap, time::Duration};

use holdfast_common::{
    Attr, DirEntry, Ino, Kind, Position, Sequence, SessionId, Time,
    limits::{DIRECTORY_LEASE, LINK_COUNT_MAX, NAME_LENGTH_MAX},
    mode::HAS_DEFAULT_LIST,
    wire::meta::{Lease, Mutated, NewInode, Op, RenameMode},
};
use parking_lot::Mutex;

use super::glimpses::{Glimpse, Glimpsed, Glimpses};

/// Names of all directories together; past it, directories are forgotten.
const NAMES_MAX: usize = 64 << 10;
/// Names of one directory that is known whole.
const DIRECTORY_NAMES_MAX: usize = 32 << 10;
/// Directories, also those of which no name is known.
const DIRECTORIES_MAX: usize = 8 << 10;
/// A lease must last so much longer for a name to be taken away under it: until the server has heard that.
const AHEAD_MARGIN: Duration = Duration::from_millis(500);
const _: () = assert!(AHEAD_MARGIN.as_millis() < DIRECTORY_LEASE.as_millis());
/// From here on, in place of the positions of changes that the server has not made yet: later than any that it has.
const AHEAD: u64 = 1 << 63;
/// How deep a directory may be in others of which nobody knows.
const HIDDEN_DEPTH_MAX: usize = 64;
/// Questions for unknown names of one directory that have to be asked before all its names are.
const UNKNOWN_BEFORE_LISTING: u32 = 3;

/// What is known of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// There is none such.
    Absent,
    /// With its attributes as they were so long ago.
    Present(Attr, Duration),
    /// The server knows.
    Unknown,
    /// As `Unknown`; and it is time to list the directory, see [`Names::list`].
    WorthListing(Listing),
    /// The same without a lease, see [`Names::put_glimpse`].
    WorthAGlimpse(Glimpse),
}

/// A directory that is being listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listing {
    pub directory: Ino,
    /// Of what is known of it: if that begins anew meanwhile, what is listed says nothing.
    beginning: u64,
}

#[derive(Debug, Default)]
pub struct Names(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    directories: HashMap<Ino, Directory>,
    /// Of inodes that have a name in `directories`; and when they were asked for.
    attrs: HashMap<Ino, KnownAttr>,
    /// In directories on which there is no lease.
    glimpses: Glimpses,
    /// Attributes that were asked for before this may not be those of now.
    attrs_not_before: Duration,
    /// In all directories.
    names: usize,
    /// This mount's changes that are under way, by directory.
    changing: HashMap<Ino, u32>,
    /// Those that the server has not been heard to have made, though this mount's programs have: by directory.
    ahead: HashMap<Ino, u32>,
    /// How many of those there have been, and how many have been heard of.
    ahead_begun: u64,
    ahead_ended: u64,
    /// What was asked for before this gives no lease: one that was taken back since may be meant.
    not_before: Duration,
    /// The last of this mount's changes of names that has been answered. What is known of a directory begins no earlier.
    heard: Position,
    /// Directories that a change of unknown outcome may still change: no lease is taken before the server has been told
    /// that the change is given up.
    doubted: HashMap<Ino, (SessionId, Sequence)>,
    /// How often anything began to be known of a directory.
    beginnings: u64,
}

/// How a change was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// When it was first sent.
    pub at: Duration,
    pub session: SessionId,
    /// The server was told then that all below this had been answered, or given up.
    pub answered_below: Sequence,
}

#[derive(Clone, Copy, Debug)]
struct KnownAttr {
    attr: Attr,
    /// `Duration::ZERO`: so long ago that it is not to be believed.
    asked: Duration,
    /// As `State::attrs_not_before`, of this one.
    not_before: Duration,
}

#[derive(Debug)]
struct Directory {
    /// Of the lease, by the server; it counts anew in each of its lives. 0: there is none yet, for the server does not know the directory.
    number: u64,
    beginning: u64,
    /// Changes before this one may have been overtaken by others, of this mount or of another.
    since: Position,
    until: Duration,
    /// Until then nobody else is told of its names either; and the lease's number of that.
    sole_until: Duration,
    sole: u64,
    /// The directory in which it was made, and the number under which nobody else was told of names there: as long as that is so, nobody
    /// else knows of this one.
    hidden_in: Option<(Ino, u64)>,
    /// As it is after all of this mount's changes, also those that the server has not made yet.
    attr: Option<Attr>,
    /// There are no other names than those in `names`.
    is_whole: bool,
    is_too_large: bool,
    is_being_listed: bool,
    unknown_asked: u32,
    /// Names with their inodes, and those that are gone for as long as an answer may come late that says otherwise. With
    /// the change that was the last, or `Position(0)` if they were listed.
    names: HashMap<Box<[u8]>, (Option<Ino>, Position)>,
}

/// A change that is under way. If it ends without a word of what came of it, its directories are not known any more.
#[derive(Debug)]
pub struct Pending<'a> {
    names: &'a Names,
    /// Sequences count anew in each session, and a later session has a higher number.
    id: (SessionId, Sequence),
    directories: Vec<Ino>,
    is_settled: bool,
}

impl Pending<'_> {
    /// What came of it is known: nothing, or what [`Names::note_change`] was told.
    pub fn settle(mut self) {
        self.is_settled = true;
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut state = self.names.0.lock();
        state.glimpses.note_change(&self.directories);
        if !self.is_settled {
            // It may still be carried out, or have been.
            for ino in &self.directories {
                state.forget(*ino);
                state.doubted.entry(*ino).and_modify(|last| *last = self.id.max(*last)).or_insert(self.id);
            }
        }
        self.directories.iter().for_each(|ino| state.end_change(*ino));
    }
}

impl Names {
    /// What this mount may say of the name without asking.
    pub fn look(&self, directory: Ino, name: &[u8], now: Duration) -> Known {
        if name.len() > NAME_LENGTH_MAX {
            return Known::Unknown;
        }
        let mut state = self.0.lock();
        let is_own = state.is_own(directory, now);
        let State { directories, attrs, glimpses, .. } = &mut *state;
        let Some(known) = directories.get_mut(&directory).filter(|known| is_own || now < known.until) else {
            return match glimpses.look(directory, name, now) {
                Glimpsed::Present(attr, age) => Known::Present(attr, age),
                Glimpsed::Unknown => Known::Unknown,
                Glimpsed::WorthListing(glimpse) => Known::WorthAGlimpse(glimpse),
            };
        };
        match known.names.get(name) {
            Some((None, _)) => Known::Absent,
            Some((Some(ino), _)) => match attrs.get(ino) {
                Some(known) => Known::Present(known.attr, now.saturating_sub(known.asked)),
                None => Known::Unknown,
            },
            None if known.is_whole => Known::Absent,
            None => match known.is_worth_listing() {
                true => Known::WorthListing(Listing { directory, beginning: known.beginning }),
                false => Known::Unknown,
            },
        }
    }

    /// The version that the directory has, if that can be said without asking.
    pub fn version(&self, directory: Ino, now: Duration) -> Option<u64> {
        let state = self.0.lock();
        let known = state.directories.get(&directory)?;
        let is_current = now < known.until || state.is_own(directory, now);
        known.attr.filter(|_| is_current).map(|attr| attr.data_version)
    }

    /// How often this mount has begun or ended to change something.
    pub fn changes(&self) -> u64 {
        self.0.lock().glimpses.changes()
    }

    /// A change is about to be asked for.
    pub fn begin_change(&self, op: &Op, session: SessionId, sequence: Sequence) -> Pending<'_> {
        let mut directories = op.directories();
        let mut state = self.0.lock();
        state.glimpses.note_change(&directories);
        if !directories.is_empty() {
            directories.extend(state.taken_away(op));
            directories.iter().for_each(|ino| *state.changing.entry(*ino).or_default() += 1);
            if let Op::Rename { from, from_name, to, to_name, .. } = op {
                state.unhide((*from, from_name));
                state.unhide((*to, to_name));
            }
        }
        Pending { names: self, id: (session, sequence), directories, is_settled: false }
    }

    /// Takes a name away that nobody else can have changed or be told of, before the server has been asked to. Returns what it stood for, and the
    /// directory as it is now; `None`: the server has to be asked first. `clock`: the time there, as far as known. `begin` is called, before anybody else can know, with
    /// what there is to do; [`Names::caught_up`] has to follow, for all in their order.
    pub fn remove_ahead(
        &self,
        (parent, name): (Ino, &[u8]),
        is_directory: bool,
        (now, clock): (Duration, Time),
        may: impl FnOnce(Ino) -> bool,
        begin: impl FnOnce(Op),
    ) -> Option<(Ino, Attr)> {
        let mut state = self.0.lock();
        let ino = state.removable(parent, name, is_directory, now).filter(|ino| may(*ino))?;
        let attr = state.take_away((parent, name), ino, is_directory, now, clock)?;
        begin(Op::Remove { parent, name: name.to_vec(), ino, time: attr.ctime });
        Some((ino, attr))
    }

    /// As [`Names::remove_ahead`], of an inode `ino` that is made. Returns its attributes and the directory's.
    pub fn make_ahead(
        &self,
        (parent, name): (Ino, &[u8]),
        new: &NewInode,
        ino: Ino,
        (now, clock): (Duration, Time),
        begin: impl FnOnce(Time),
    ) -> Option<(Attr, Attr)> {
        let mut state = self.0.lock();
        if !state.may_make(parent, name, now) {
            return None;
        }
        let (made, directory) = state.put_in((parent, name), new, ino, now, clock)?;
        begin(directory.ctime);
        Some((made, directory))
    }

    /// The server has made the change that was the first of those ahead, at this position; or it has not, and what is known of the directory is
    /// not true.
    pub fn caught_up(&self, ((parent, name), ino): ((Ino, &[u8]), Ino), made: Option<(Position, &[Attr])>) {
        let mut state = self.0.lock();
        let is_last = state.end_ahead(parent);
        let ahead = Position(AHEAD + state.ahead_ended);
        match made {
            None => {
                state.forget(parent);
                state.forget(ino);
            }
            Some((position, directories)) => {
                if let Some(known) = state.directories.get_mut(&parent) {
                    known.settle_ahead(name, ahead, position);
                    directories.iter().filter(|attr| attr.ino == parent).for_each(|attr| known.catch_up(attr, is_last));
                }
            }
        }
        state.end_change(parent);
    }

    /// A change of this mount was made at `position` and answered with these leases.
    pub fn note_change(&self, op: &Op, outcome: &Mutated, position: Position, leases: &[Lease], asked: Asked) {
        let mut state = self.0.lock();
        let made = op.made_directory(outcome);
        state.glimpses.note_change(&op.directories());
        outcome.attrs().iter().for_each(|attr| state.glimpses.note_heard(attr));
        for lease in leases {
            if asked.at > state.not_before && !state.is_doubted(lease.directory, asked) {
                let is_new = (made == Some(lease.directory)).then_some(matches!(op, Op::Place { .. }));
                state.grant(*lease, position, asked.at, is_new);
            }
        }
        // Of what it concerns there may have been later answers.
        let later: Vec<KnownAttr> =
            outcome.attrs().iter().filter_map(|attr| state.attrs.get(&attr.ino)).copied().collect();
        state.apply(op, outcome, position, asked.at);
        outcome.attrs().iter().for_each(|attr| state.note_directory(attr));
        if let Some(made) = made.filter(|_| asked.at > state.not_before) {
            state.hide(made, leases);
        }
        later.iter().for_each(|known| state.merge_attr(known));
        let told = (asked.session, asked.answered_below);
        state.doubted.retain(|_, given_up| *given_up >= told);
        if !op.directories().is_empty() {
            state.heard = state.heard.max(position);
        }
    }

    /// Attributes that the server was asked for at `asked`.
    pub fn note_attrs(&self, attrs: &[&Attr], asked: Duration) {
        let mut state = self.0.lock();
        attrs.iter().for_each(|attr| state.glimpses.note_heard(attr));
        if !state.directories.is_empty() {
            attrs.iter().for_each(|attr| state.note_attr(attr, asked));
        }
    }

    /// Entries of a directory on which there is no lease, asked for at `asked`; are they all? `None`: the server did not say.
    pub fn put_glimpse(&self, glimpse: Glimpse, entries: Option<(Vec<DirEntry>, bool)>, asked: Duration) {
        let mut state = self.0.lock();
        match entries {
            Some((entries, are_all)) => state.glimpses.put(glimpse, entries, are_all, asked),
            None => state.glimpses.give_up(glimpse),
        }
    }

    /// All entries of a directory, listed while nothing was known to have ended the lease.
    pub fn list(&self, listing: Listing, entries: Vec<DirEntry>, asked: Duration) {
        self.0.lock().list(listing, entries, asked);
    }

    /// The directory was not listed: it has too many entries, or the server did not say.
    pub fn give_up_listing(&self, listing: Listing, is_too_large: bool) {
        if let Some(known) = self.0.lock().listed(listing) {
            (known.is_being_listed, known.unknown_asked) = (false, 0);
            known.is_too_large |= is_too_large;
        }
    }

    /// The lease is not relied on any more.
    pub fn recall(&self, lease: Lease, now: Duration) {
        let mut state = self.0.lock();
        state.not_before = now;
        if state.directories.get(&lease.directory).is_some_and(|known| known.number <= lease.number) {
            state.forget(lease.directory);
        }
    }

    /// Nothing is known any more, and what is still to be answered gives no lease.
    pub fn distrust(&self, now: Duration) {
        let mut state = self.0.lock();
        state.glimpses.distrust();
        let State { changing, ahead, ahead_begun, ahead_ended, doubted, beginnings, glimpses, .. } =
            std::mem::take(&mut *state);
        *state = State {
            glimpses,
            changing,
            ahead,
            ahead_begun,
            ahead_ended,
            doubted,
            beginnings,
            not_before: now,
            ..State::default()
        };
    }

    /// Attributes that were asked for before `now` may not be those of now.
    pub fn distrust_attrs(&self, now: Duration) {
        let mut state = self.0.lock();
        state.attrs_not_before = now;
        state.glimpses.distrust();
        state.attrs.values_mut().for_each(|known| known.asked = Duration::ZERO);
    }

    /// As [`Names::distrust_attrs`], of one inode.
    pub fn distrust_attr(&self, ino: Ino, now: Duration) {
        self.0.lock().distrust_attr(ino, now);
    }

    /// Is there a lease that may be recalled?
    pub fn has_leases(&self, now: Duration) -> bool {
        self.0.lock().directories.values().any(|known| now < known.until)
    }
}

impl KnownAttr {
    fn new(attr: Attr, asked: Duration, not_before: Duration) -> Self {
        Self { attr, asked: if asked > not_before { asked } else { Duration::ZERO }, not_before: Duration::ZERO }
    }
}

impl Directory {
    /// One that is new, and empty.
    fn unknown_to_others(beginning: u64) -> Self {
        Self {
            number: 0,
            beginning,
            since: Position(0),
            until: Duration::ZERO,
            sole_until: Duration::ZERO,
            sole: 0,
            hidden_in: None,
            attr: None,
            is_whole: true,
            is_too_large: false,
            is_being_listed: false,
            unknown_asked: 0,
            names: HashMap::new(),
        }
    }

    /// All its names, and none of them stands for anything: as far as it is known.
    fn is_empty(&self) -> bool {
        self.is_whole && !self.is_being_listed && self.names.values().all(|(ino, _)| ino.is_none())
    }

    fn settle_ahead(&mut self, name: &[u8], ahead: Position, position: Position) {
        if let Some((_, last)) = self.names.get_mut(name).filter(|(_, last)| *last == ahead) {
            *last = position;
        }
    }

    /// The directory as the server had it after one of the changes ahead, in order.
    fn catch_up(&mut self, attr: &Attr, is_last: bool) {
        self.attr = self.attr.map(|own| match is_last {
            true => *attr,
            false => {
                let Attr { nlink, size, mtime, ctime, data_version, .. } = own;
                Attr { nlink, size, mtime, ctime, data_version, ..*attr }
            }
        });
    }

    /// What the server said of it at some time.
    fn note_attr(&mut self, attr: &Attr, is_ahead: bool) {
        match self.attr {
            Some(own) if attr.ctime <= own.ctime => {}
            // Somebody else has changed it: which of the changes ahead are in that is not known.
            _ if is_ahead => self.attr = None,
            _ => self.attr = Some(*attr),
        }
    }

    fn is_worth_listing(&mut self) -> bool {
        self.unknown_asked += 1;
        let is_worth_it = self.unknown_asked >= UNKNOWN_BEFORE_LISTING && !self.is_being_listed && !self.is_too_large;
        self.is_being_listed |= is_worth_it;
        is_worth_it
    }
}

impl State {
    fn is_doubted(&self, directory: Ino, asked: Asked) -> bool {
        let told = (asked.session, asked.answered_below);
        self.doubted.get(&directory).is_some_and(|given_up| *given_up >= told)
    }

    /// `is_new`: it has just been made; and was it made ahead?
    fn grant(&mut self, lease: Lease, position: Position, asked: Duration, is_new: Option<bool>) {
        let until = asked + DIRECTORY_LEASE;
        let sole_until = if lease.sole > 0 { until } else { Duration::ZERO };
        match self.directories.get_mut(&lease.directory) {
            // What this mount has done there since is known.
            Some(known) if known.number == 0 && is_new == Some(true) => {
                (known.number, known.until) = (lease.number, until);
                (known.sole, known.sole_until) = (lease.sole, sole_until);
                if lease.sole == 0 {
                    known.hidden_in = None;
                }
                return;
            }
            Some(known) if known.number == lease.number => {
                known.until = known.until.max(until);
                // Numbers ascend; one that comes late is of no use any more.
                if lease.sole == 0 {
                    // The server's disk is full, or somebody looks: nothing goes ahead any more, neither here nor in what was made here.
                    (known.sole_until, known.hidden_in) = (Duration::ZERO, None);
                } else if lease.sole > known.sole {
                    (known.sole, known.sole_until) = (lease.sole, sole_until);
                } else if lease.sole == known.sole {
                    known.sole_until = known.sole_until.max(sole_until);
                }
                return;
            }
            // It came late.
            Some(known) if known.number > lease.number => return,
            _ => self.forget(lease.directory),
        }
        // What is ahead there and has been forgotten would be taken for not made.
        if self.ahead.contains_key(&lease.directory) {
            return;
        }
        self.make_room();
        let Lease { directory, number, sole } = lease;
        self.beginnings += 1;
        let fresh = Directory {
            number,
            beginning: self.beginnings,
            since: position.max(self.heard),
            until,
            sole_until,
            sole,
            hidden_in: None,
            attr: None,
            // This mount may have been faster to find the new directory, and to change it, than to hear that it made it.
            // What is made ahead, and forgotten meanwhile, may be full already.
            is_whole: is_new == Some(false) && self.heard < position,
            is_too_large: false,
            is_being_listed: false,
            unknown_asked: 0,
            names: HashMap::new(),
        };
        self.directories.insert(directory, fresh);
    }

    fn apply(&mut self, op: &Op, outcome: &Mutated, position: Position, asked: Duration) {
        match (op, outcome) {
            (
                Op::Make { parent, name, .. }
                | Op::Place { parent, name, .. }
                | Op::PlaceOpen { parent, name, .. }
                | Op::Link { parent, name, .. },
                Mutated::Inode { attr, .. },
            ) => {
                self.enter(*parent, name, Some((attr, asked)), position);
            }
            (
                Op::Unlink { parent, name } | Op::Rmdir { parent, name } | Op::Remove { parent, name, .. },
                Mutated::Removed { attr },
            ) => {
                self.enter(*parent, name, None, position);
                if attr.kind == Kind::Directory {
                    self.forget(attr.ino);
                }
            }
            (Op::Rename { from, from_name, to, to_name, mode }, Mutated::Renamed { moved, replaced }) => {
                let is_plain = matches!(mode, RenameMode::Replace | RenameMode::NoReplace);
                // Two names of one inode stay as they are.
                let may_have_stayed = moved.kind != Kind::Directory && moved.nlink > 1;
                if !is_plain || may_have_stayed {
                    [*from, *to].into_iter().for_each(|ino| self.forget(ino));
                    return;
                }
                self.enter(*from, from_name, None, position);
                self.enter(*to, to_name, Some((moved, asked)), position);
                if let Some(replaced) = replaced.filter(|replaced| replaced.kind == Kind::Directory) {
                    self.forget(replaced.ino);
                }
            }
            // The answer does not say what the attributes are now.
            (Op::Accessed { files, .. }, _) => files.iter().for_each(|(ino, _)| self.distrust_attr(*ino, asked)),
            _ => {}
        }
    }

    /// The directory that the change takes away.
    fn taken_away(&self, op: &Op) -> Option<Ino> {
        let (parent, name) = match op {
            Op::Rmdir { parent, name } => (*parent, name),
            Op::Rename { to, to_name, .. } => (*to, to_name),
            _ => return None,
        };
        let (ino, _) = self.directories.get(&parent)?.names.get(name.as_slice())?;
        ino.filter(|ino| self.directories.contains_key(ino))
    }

    /// What has that name may get another, where somebody else finds it.
    fn unhide(&mut self, (parent, name): (Ino, &[u8])) {
        let named = self.directories.get(&parent).and_then(|known| known.names.get(name)).and_then(|(ino, _)| *ino);
        match named {
            Some(ino) => {
                if let Some(known) = self.directories.get_mut(&ino) {
                    known.hidden_in = None;
                }
            }
            // It may be any.
            None => {
                let hidden = |known: &Directory| known.hidden_in.is_some_and(|(inside, _)| inside == parent);
                self.directories.values_mut().filter(|known| hidden(known)).for_each(|known| known.hidden_in = None);
            }
        }
    }

    /// A directory has been made in another, and these leases are as of that moment.
    fn hide(&mut self, ino: Ino, leases: &[Lease]) {
        let parent = leases.iter().find(|lease| lease.directory != ino && lease.sole > 0);
        if let Some(made) = self.directories.get_mut(&ino) {
            made.hidden_in = parent.map(|lease| (lease.directory, lease.sole));
        }
    }

    fn enter(&mut self, directory: Ino, name: &[u8], found: Option<(&Attr, Duration)>, position: Position) {
        let Self { directories, attrs, names, attrs_not_before, .. } = self;
        let Some(known) = directories.get_mut(&directory).filter(|known| known.since <= position) else { return };
        if known.names.get(name).is_some_and(|(_, last)| *last > position) {
            return;
        }
        let before = known.names.insert(name.into(), (found.map(|(attr, _)| attr.ino), position));
        match before {
            None => *names += 1,
            Some((Some(ino), _)) => drop(attrs.remove(&ino)),
            Some((None, _)) => {}
        }
        if let Some((attr, asked)) = found {
            attrs.insert(attr.ino, KnownAttr::new(*attr, asked, *attrs_not_before));
        }
        if known.names.len() > DIRECTORY_NAMES_MAX {
            self.begin_anew(directory, position);
        } else if self.names > NAMES_MAX {
            self.make_room_but_for(directory);
        }
    }

    fn distrust_attr(&mut self, ino: Ino, now: Duration) {
        self.glimpses.distrust_attr(ino);
        if let Some(known) = self.attrs.get_mut(&ino) {
            (known.asked, known.not_before) = (Duration::ZERO, now);
        }
    }

    /// Of what was known before: it may be newer, and be known not to be true any more.
    fn merge_attr(&mut self, before: &KnownAttr) {
        if let Some(known) = self.attrs.get_mut(&before.attr.ino) {
            known.not_before = before.not_before;
            if known.asked <= before.not_before {
                known.asked = Duration::ZERO;
            }
        }
        self.note_attr(&before.attr, before.asked);
    }

    /// What the name stands for, if this mount may take it away by itself.
    fn removable(&self, parent: Ino, name: &[u8], is_directory: bool, now: Duration) -> Option<Ino> {
        if !self.is_own(parent, now) {
            return None;
        }
        let (Some(ino), _) = self.directories.get(&parent)?.names.get(name)? else { return None };
        let attr = self.attrs.get(ino)?.attr;
        let may = match (is_directory, attr.kind) {
            (true, Kind::Directory) => {
                let inside = self.directories.get(ino)?;
                if !self.is_own(*ino, now) && now + AHEAD_MARGIN >= inside.until {
                    return None;
                }
                // A change that is under way there may make something.
                inside.is_empty() && self.changing.get(ino) == self.ahead.get(ino)
            }
            (true, _) | (false, Kind::Directory) => false,
            // Its other names are told how many are left.
            (false, _) => attr.nlink == 1,
        };
        may.then_some(*ino)
    }

    /// Can nobody else change names there, or be told of any, before this mount is told to stop?
    fn is_own(&self, mut ino: Ino, now: Duration) -> bool {
        for _ in 0..HIDDEN_DEPTH_MAX {
            let Some(known) = self.directories.get(&ino) else { return false };
            if now + AHEAD_MARGIN < known.sole_until {
                return true;
            }
            let Some((parent, sole)) = known.hidden_in else { return false };
            if self.directories.get(&parent).is_none_or(|known| known.sole != sole) {
                return false;
            }
            ino = parent;
        }
        false
    }

    /// Is it known that there is no such name, and may there be one more?
    fn may_make(&self, parent: Ino, name: &[u8], now: Duration) -> bool {
        let Some(known) = self.directories.get(&parent) else { return false };
        let is_absent = match known.names.get(name) {
            Some((ino, _)) => ino.is_none(),
            None => known.is_whole,
        };
        let has_room = known.names.len() < DIRECTORY_NAMES_MAX && self.names < NAMES_MAX;
        is_absent && has_room && name.len() <= NAME_LENGTH_MAX && self.is_own(parent, now)
    }

    /// Returns what is made and the directory with it. `None`: what would become of it is not known, and nothing is done.
    fn put_in(
        &mut self,
        (parent, name): (Ino, &[u8]),
        new: &NewInode,
        ino: Ino,
        now: Duration,
        clock: Time,
    ) -> Option<(Attr, Attr)> {
        let is_directory = new.kind == Kind::Directory;
        let known = self.directories.get_mut(&parent)?;
        let attr = known.attr.as_mut()?;
        if attr.mode & HAS_DEFAULT_LIST != 0 || is_directory && attr.nlink >= LINK_COUNT_MAX {
            return None;
        }
        let time = clock.max(attr.ctime.after_a_nanosecond());
        (attr.ctime, attr.mtime) = (time, time);
        attr.size += 1;
        attr.data_version += 1;
        attr.nlink += u32::from(is_directory);
        let (directory, made) = (*attr, new.attr(ino, attr, time));
        let hidden_in = Some((parent, known.sole));
        let position = self.begin_ahead(parent);
        self.put_name((parent, name), Some(ino), position);
        self.attrs.insert(ino, KnownAttr { attr: made, asked: now, not_before: Duration::ZERO });
        if is_directory {
            self.make_room();
            self.beginnings += 1;
            let fresh = Directory { hidden_in, attr: Some(made), ..Directory::unknown_to_others(self.beginnings) };
            self.directories.insert(ino, fresh);
        }
        self.note_attr(&directory, now);
        Some((made, directory))
    }

    /// Returns what stands for the position of the change.
    fn begin_ahead(&mut self, directory: Ino) -> Position {
        self.glimpses.note_change(&[directory]);
        self.glimpses.distrust_attr(directory);
        *self.changing.entry(directory).or_default() += 1;
        *self.ahead.entry(directory).or_default() += 1;
        self.ahead_begun += 1;
        Position(AHEAD + self.ahead_begun)
    }

    fn put_name(&mut self, (directory, name): (Ino, &[u8]), found: Option<Ino>, position: Position) {
        let Some(known) = self.directories.get_mut(&directory) else { return };
        if known.names.insert(name.into(), (found, position)).is_none() {
            self.names += 1;
        }
    }

    /// Returns the directory without the name. `None`: its attributes are not known, and nothing is done.
    fn take_away(
        &mut self,
        (parent, name): (Ino, &[u8]),
        ino: Ino,
        is_directory: bool,
        now: Duration,
        clock: Time,
    ) -> Option<Attr> {
        let known = self.directories.get_mut(&parent)?;
        let attr = known.attr.as_mut()?;
        let time = clock.max(attr.ctime.after_a_nanosecond());
        (attr.ctime, attr.mtime) = (time, time);
        attr.size = attr.size.saturating_sub(1);
        attr.data_version += 1;
        attr.nlink = attr.nlink.saturating_sub(u32::from(is_directory));
        let attr = *attr;
        let position = self.begin_ahead(parent);
        self.put_name((parent, name), None, position);
        self.attrs.remove(&ino);
        if is_directory {
            self.forget(ino);
        }
        self.note_attr(&attr, now);
        Some(attr)
    }

    fn note_directory(&mut self, attr: &Attr) {
        if let Some(directory) = self.directories.get_mut(&attr.ino) {
            directory.note_attr(attr, self.ahead.contains_key(&attr.ino));
        }
    }

    fn note_attr(&mut self, attr: &Attr, asked: Duration) {
        self.note_directory(attr);
        let Some(known) = self.attrs.get_mut(&attr.ino) else { return };
        if known.attr.ctime <= attr.ctime {
            known.attr = *attr;
            if asked > known.not_before.max(self.attrs_not_before) {
                known.asked = known.asked.max(asked);
            }
        }
    }

    fn listed(&mut self, listing: Listing) -> Option<&mut Directory> {
        self.directories.get_mut(&listing.directory).filter(|known| known.beginning == listing.beginning)
    }

    fn list(&mut self, listing: Listing, entries: Vec<DirEntry>, asked: Duration) {
        let Self { directories, attrs, names, attrs_not_before, .. } = self;
        let Listing { directory, beginning } = listing;
        let Some(known) = directories.get_mut(&directory).filter(|known| known.beginning == beginning) else { return };
        known.is_being_listed = false;
        known.is_whole = true;
        for entry in entries {
            // What this mount has changed meanwhile is known better.
            let name = entry.name.into_boxed_slice();
            if known.names.contains_key(&name) {
                continue;
            }
            known.names.insert(name, (Some(entry.ino), Position(0)));
            *names += 1;
            if let Some(attr) = entry.attr {
                attrs.entry(attr.ino).or_insert(KnownAttr::new(attr, asked, *attrs_not_before));
            }
        }
        if !self.changing.contains_key(&directory) {
            self.forget_gone(directory);
        }
        if self.names > NAMES_MAX {
            self.make_room_but_for(directory);
        }
    }

    /// Was it the last?
    fn end_ahead(&mut self, directory: Ino) -> bool {
        self.ahead_ended += 1;
        let Some(count) = self.ahead.get_mut(&directory) else { return true };
        *count -= 1;
        let is_last = *count == 0;
        if is_last {
            self.ahead.remove(&directory);
        }
        is_last
    }

    fn end_change(&mut self, directory: Ino) {
        if let Some(count) = self.changing.get_mut(&directory) {
            *count -= 1;
            if *count == 0 {
                self.changing.remove(&directory);
                self.forget_gone(directory);
            }
        }
    }

    /// No answer is on its way that could say otherwise of what is gone.
    fn forget_gone(&mut self, directory: Ino) {
        let Some(known) = self.directories.get_mut(&directory) else { return };
        if known.is_whole && !known.is_being_listed {
            let before = known.names.len();
            known.names.retain(|_, (ino, _)| ino.is_some());
            self.names -= before - known.names.len();
        }
    }

    fn forget(&mut self, directory: Ino) {
        let Some(known) = self.directories.remove(&directory) else { return };
        self.names -= known.names.len();
        for ino in known.names.into_values().filter_map(|(ino, _)| ino) {
            self.attrs.remove(&ino);
        }
    }

    /// The lease stays. What is known under it begins anew after `position`, and will not be everything.
    fn begin_anew(&mut self, directory: Ino, position: Position) {
        let Some(known) = self.directories.get_mut(&directory) else { return };
        self.beginnings += 1;
        (known.beginning, known.since) = (self.beginnings, position.max(self.heard));
        (known.is_whole, known.is_too_large, known.is_being_listed) = (false, true, false);
        let gone = std::mem::take(&mut known.names);
        self.names -= gone.len();
        for ino in gone.into_values().filter_map(|(ino, _)| ino) {
            self.attrs.remove(&ino);
        }
    }

    fn make_room(&mut self) {
        if self.directories.len() < DIRECTORIES_MAX {
            return;
        }
        self.forget_oldest(None, |state| state.directories.len() <= DIRECTORIES_MAX / 2);
    }

    fn make_room_but_for(&mut self, directory: Ino) {
        self.forget_oldest(Some(directory), |state| state.names <= NAMES_MAX / 2);
    }

    /// Forgets directories, but for `kept`, from the one whose lease ends first, until it is enough: half of what there may be, so that the
    /// next time is far away.
    fn forget_oldest(&mut self, kept: Option<Ino>, is_enough: impl Fn(&Self) -> bool) {
        let mut by_age: Vec<(Duration, Ino)> =
            self.directories.iter().map(|(ino, known)| (known.until, *ino)).collect();
        by_age.sort_unstable();
        for (_, ino) in by_age.into_iter().filter(|(_, ino)| Some(*ino) != kept) {
            if is_enough(self) {
                return;
            }
            self.forget(ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Ino = Ino(1);
    const SESSION: SessionId = SessionId(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn attr(ino: u64, kind: Kind) -> Attr {
        Attr::example(ino, kind)
    }

    fn make(parent: Ino, name: &str, kind: Kind) -> Op {
        let new = NewInode { kind, mode: 0o755, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
        Op::Make { parent, name: name.into(), new, exclusive: true, open: false }
    }

    fn asked(at: Duration) -> Asked {
        Asked { at, session: SESSION, answered_below: Sequence(1) }
    }

    /// The mount makes `name` in `HOME` and has a lease by it.
    fn note_made(names: &Names, name: &str, ino: u64, number: u64, position: u64, at: Duration) {
        let outcome = Mutated::Inode { attr: attr(ino, Kind::File), created: true };
        let lease = Lease { directory: HOME, number, sole: 0 };
        names.note_change(&make(HOME, name, Kind::File), &outcome, Position(position), &[lease], asked(at));
    }

    fn note_removed(names: &Names, name: &str, ino: u64, position: u64, at: Duration) {
        let op = Op::Unlink { parent: HOME, name: name.into() };
        let outcome = Mutated::Removed { attr: attr(ino, Kind::File) };
        names.note_change(&op, &outcome, Position(position), &[], asked(at));
    }

    /// `HOME`, listed whole.
    fn whole(entries: &[(&str, u64)]) -> Names {
        let names = Names::default();
        note_made(&names, "first", 10, 1, 1, ms(100));
        let listing = worth_listing(&names, ms(100));
        let entry = |(name, ino): &(&str, u64)| DirEntry {
            cookie: *ino,
            name: (*name).into(),
            ino: Ino(*ino),
            kind: Kind::File,
            attr: Some(attr(*ino, Kind::File)),
        };
        names.list(listing, entries.iter().map(entry).collect(), ms(101));
        names
    }

    fn worth_listing(names: &Names, now: Duration) -> Listing {
        for _ in 1..UNKNOWN_BEFORE_LISTING {
            assert_eq!(names.look(HOME, b"unknown", now), Known::Unknown);
        }
        match names.look(HOME, b"unknown", now) {
            Known::WorthListing(listing) => listing,
            other => panic!("{other:?}"),
        }
    }

    /// The mount makes a directory in `HOME`, with leases on both as given.
    fn note_made_directory(names: &Names, name: &str, ino: u64, position: u64, at: Duration, leases: &[Lease]) {
        let outcome = Mutated::Inode { attr: attr(ino, Kind::Directory), created: true };
        names.note_change(&make(HOME, name, Kind::Directory), &outcome, Position(position), leases, asked(at));
        names.note_attrs(&[&Attr { size: position, nlink: 9, ..attr(HOME.0, Kind::Directory) }], at);
    }

    fn remove_ahead(names: &Names, name: &str, is_directory: bool, now: Duration) -> Option<(Ino, Attr)> {
        names.remove_ahead((HOME, name.as_bytes()), is_directory, (now, Time::default()), |_| true, |_| ())
    }

    const OWN: Lease = Lease { directory: HOME, number: 1, sole: 1 };

    #[test]
    fn a_name_is_taken_away_ahead_only_where_nobody_else_may_look() {
        let names = whole(&[("a", 11), ("b", 12), ("c", 13)]);
        names.note_attrs(&[&attr(HOME.0, Kind::Directory)], ms(102));
        assert_eq!(remove_ahead(&names, "a", false, ms(110)), None, "others may look");
        let note = |number, sole, position, at| {
            let outcome = Mutated::Inode { attr: attr(number, Kind::File), created: true };
            let lease = Lease { directory: HOME, number: 1, sole };
            let op = make(HOME, &number.to_string(), Kind::File);
            names.note_change(&op, &outcome, Position(position), &[lease], asked(at));
        };
        note(20, 2, 2, ms(120));
        let (ino, directory) = remove_ahead(&names, "a", false, ms(130)).expect("it may");
        assert_eq!((ino, directory.ino), (Ino(11), HOME));
        assert_eq!(names.look(HOME, b"a", ms(131)), Known::Absent);
        assert_eq!(remove_ahead(&names, "a", false, ms(131)), None, "it is gone");
        assert_eq!(remove_ahead(&names, "b", true, ms(131)), None, "it is no directory");
        let late = ms(120) + DIRECTORY_LEASE - AHEAD_MARGIN;
        assert_eq!(remove_ahead(&names, "b", false, late), None, "the lease may end before the server hears of it");
        assert!(remove_ahead(&names, "b", false, late - ms(1)).is_some());
        names.recall(Lease { directory: HOME, number: 1, sole: 2 }, ms(700));
        assert_eq!(remove_ahead(&names, "c", false, ms(701)), None);
    }

    fn make_ahead(names: &Names, parent: Ino, name: &str, kind: Kind, ino: u64, now: Duration) -> Option<(Attr, Attr)> {
        let new = NewInode { kind, mode: 0o750, uid: 3, gid: 4, rdev: 0, target: Vec::new() };
        names.make_ahead((parent, name.as_bytes()), &new, Ino(ino), (now, Time { secs: 8, nanos: 0 }), |_| ())
    }

    #[test]
    fn what_is_made_ahead_is_there_and_what_is_in_it_nobody_else_can_change() {
        let names = whole(&[("there", 11)]);
        note_made_directory(&names, "d", 12, 2, ms(120), &[OWN, Lease { directory: Ino(12), number: 2, sole: 2 }]);
        assert_eq!(make_ahead(&names, HOME, "there", Kind::File, 20, ms(130)), None, "the name is taken");
        let (made, directory) = make_ahead(&names, HOME, "new", Kind::Directory, 21, ms(130)).expect("it may");
        assert_eq!((made.ino, made.mode, made.nlink, made.ctime), (Ino(21), 0o750, 2, directory.ctime));
        assert!(matches!(names.look(HOME, b"new", ms(131)), Known::Present(attr, _) if attr == made));
        assert_eq!(names.look(Ino(21), b"x", ms(131)), Known::Absent);
        let (inner, _) = make_ahead(&names, Ino(21), "in", Kind::Directory, 22, ms(131)).expect("nobody else knows it");
        assert!(make_ahead(&names, Ino(22), "deep", Kind::File, 23, ms(131)).is_some());
        assert_eq!(remove_ahead(&names, "new", true, ms(132)), None, "it is not empty");
        // The server has made the first: what was done in it since is still known.
        let place = Op::Place {
            parent: HOME,
            name: b"new".to_vec(),
            new: NewInode { kind: Kind::Directory, mode: 0o750, uid: 3, gid: 4, rdev: 0, target: Vec::new() },
            ino: Ino(21),
            time: made.ctime,
        };
        let outcome = Mutated::Inode { attr: made, created: true };
        let leases = [OWN, Lease { directory: Ino(21), number: 5, sole: 5 }];
        names.note_change(&place, &outcome, Position(3), &leases, asked(ms(132)));
        names.caught_up(((HOME, b"new"), Ino(21)), Some((Position(3), &[directory])));
        assert!(matches!(names.look(Ino(21), b"in", ms(140)), Known::Present(attr, _) if attr.ino == inner.ino));
        // Others look at the first directory, and so may find what is in it.
        names.recall(Lease { directory: HOME, number: 1, sole: 1 }, ms(150));
        assert_eq!(names.look(HOME, b"new", ms(151)), Known::Unknown);
        assert!(matches!(names.look(Ino(21), b"in", ms(151)), Known::Present(..)), "it has a lease of its own by now");
        names.recall(leases[1], ms(152));
        assert_eq!(names.look(Ino(22), b"deep", ms(153)), Known::Unknown);
        assert_eq!(make_ahead(&names, Ino(22), "more", Kind::File, 24, ms(153)), None);
    }

    #[test]
    fn a_server_that_is_full_lets_nothing_more_be_made_ahead() {
        let names = whole(&[]);
        note_made_directory(&names, "d", 12, 2, ms(120), &[OWN]);
        assert!(make_ahead(&names, HOME, "new", Kind::Directory, 21, ms(130)).is_some());
        assert!(make_ahead(&names, Ino(21), "in", Kind::Directory, 22, ms(130)).is_some());
        assert!(make_ahead(&names, Ino(22), "deep", Kind::File, 23, ms(130)).is_some());
        let full = Lease { sole: 0, ..OWN };
        note_made_directory(&names, "e", 13, 3, ms(140), &[full]);
        assert_eq!(make_ahead(&names, HOME, "more", Kind::File, 24, ms(141)), None);
        note_made_directory(&names, "f", 14, 4, ms(150), &[OWN]);
        assert!(make_ahead(&names, HOME, "more", Kind::File, 24, ms(151)).is_some(), "there is room again");
    }

    #[test]
    fn what_was_not_made_after_all_is_not_known_any_more() {
        let names = whole(&[]);
        note_made_directory(&names, "d", 12, 2, ms(120), &[OWN]);
        assert!(make_ahead(&names, HOME, "new", Kind::Directory, 21, ms(130)).is_some());
        assert!(make_ahead(&names, Ino(21), "in", Kind::File, 22, ms(130)).is_some());
        names.caught_up(((HOME, b"new"), Ino(21)), None);
        names.caught_up(((Ino(21), b"in"), Ino(22)), None);
        assert_eq!(names.look(HOME, b"new", ms(131)), Known::Unknown);
        assert_eq!(names.look(Ino(21), b"in", ms(131)), Known::Unknown);
    }

    #[test]
    fn each_removal_ahead_leaves_the_directory_later_and_smaller() {
        let names = Names::default();
        note_made_directory(&names, "a", 11, 1, ms(100), &[OWN, Lease { directory: Ino(11), number: 2, sole: 2 }]);
        note_made_directory(&names, "b", 12, 2, ms(110), &[OWN, Lease { directory: Ino(12), number: 3, sole: 3 }]);
        names.note_attrs(
            &[&Attr { size: 2, nlink: 4, ctime: Time { secs: 5, nanos: 0 }, ..attr(1, Kind::Directory) }],
            ms(111),
        );
        let (_, first) = remove_ahead(&names, "a", true, ms(120)).expect("it may");
        let (_, second) = remove_ahead(&names, "b", true, ms(120)).expect("it may");
        assert_eq!([first.size, second.size], [1, 0]);
        assert_eq!([first.nlink, second.nlink], [3, 2]);
        assert!(first.ctime > Time { secs: 5, nanos: 0 } && first.ctime < second.ctime, "{first:?} {second:?}");
        assert_eq!((second.mtime, second.mode), (second.ctime, 0o755));
        // Somebody else has changed its mode meanwhile: the server's answers say so.
        names.caught_up(((HOME, b"a"), Ino(11)), Some((Position(3), &[Attr { mode: 0o700, ..first }])));
        note_made_directory(&names, "c", 13, 4, ms(130), &[OWN, Lease { directory: Ino(13), number: 4, sole: 4 }]);
        let (_, third) = remove_ahead(&names, "c", true, ms(140)).expect("it may");
        assert_eq!(third.mode, 0o700);
        assert!(third.ctime > second.ctime);
    }

    #[test]
    fn a_directory_that_others_may_have_found_is_removed_by_the_server_only() {
        let names = Names::default();
        let made = |name: &str, ino, position, at, sole| {
            let inside = Lease { directory: Ino(ino), number: ino, sole: ino };
            note_made_directory(&names, name, ino, position, at, &[Lease { sole, ..OWN }, inside]);
        };
        made("old", 11, 1, ms(100), 1);
        made("full", 12, 2, ms(101), 1);
        let file = Mutated::Inode { attr: attr(20, Kind::File), created: true };
        names.note_change(&make(Ino(12), "x", Kind::File), &file, Position(3), &[], asked(ms(102)));
        let later = ms(100) + 3 * DIRECTORY_LEASE;
        made("again", 13, 4, later, 1);
        assert_eq!(remove_ahead(&names, "full", true, later), None, "it is not empty");
        assert!(remove_ahead(&names, "old", true, later).is_some(), "nobody else has been told of it since");
        made("kept", 14, 5, later, 1);
        let even_later = later + 20 * DIRECTORY_LEASE;
        made("newest", 15, 6, even_later, 30);
        assert_eq!(remove_ahead(&names, "kept", true, even_later), None, "somebody has looked meanwhile");
        assert!(remove_ahead(&names, "newest", true, even_later).is_some());
    }

    #[test]
    fn a_new_directory_is_known_whole_at_once() {
        let names = Names::default();
        let outcome = Mutated::Inode { attr: attr(7, Kind::Directory), created: true };
        let lease = Lease { directory: Ino(7), number: 1, sole: 0 };
        names.note_change(&make(HOME, "new", Kind::Directory), &outcome, Position(1), &[lease], asked(ms(100)));
        assert_eq!(names.look(Ino(7), b"anything", ms(200)), Known::Absent);
        assert_eq!(names.look(HOME, b"anything", ms(200)), Known::Unknown);
        assert_eq!(names.look(Ino(7), &[b'x'; NAME_LENGTH_MAX + 1], ms(200)), Known::Unknown, "another error");
    }

    #[test]
    fn what_is_known_counts_while_the_lease_lasts_and_again_under_the_same_number() {
        let names = whole(&[("there", 11)]);
        let end = ms(100) + DIRECTORY_LEASE;
        assert_eq!(names.look(HOME, b"missing", end - ms(1)), Known::Absent);
        assert_eq!(names.look(HOME, b"missing", end), Known::Unknown);
        note_made(&names, "second", 12, 1, 2, end + ms(500));
        assert_eq!(names.look(HOME, b"missing", end + ms(500)), Known::Absent);
        assert_eq!(names.look(HOME, b"there", end + ms(501)), Known::Present(attr(11, Kind::File), end + ms(400)));
        note_made(&names, "third", 13, 2, 5, end + ms(600));
        assert_eq!(names.look(HOME, b"missing", end + ms(600)), Known::Unknown, "others have changed it");
    }

    #[test]
    fn the_later_change_of_a_name_counts_whichever_answer_comes_first() {
        let names = whole(&[]);
        let op = make(HOME, "x", Kind::File);
        let _making = names.begin_change(&op, SESSION, Sequence(2));
        note_removed(&names, "x", 20, 9, ms(110));
        note_made(&names, "x", 20, 1, 8, ms(105));
        assert_eq!(names.look(HOME, b"x", ms(200)), Known::Absent);
    }

    #[test]
    fn a_listing_does_not_undo_what_the_mount_did_meanwhile() {
        let names = Names::default();
        note_made(&names, "first", 10, 1, 1, ms(100));
        let listing = worth_listing(&names, ms(100));
        assert_eq!(names.look(HOME, b"unknown", ms(100)), Known::Unknown, "one listing at a time");
        note_removed(&names, "first", 10, 2, ms(101));
        let entry = DirEntry {
            cookie: 1,
            name: b"first".to_vec(),
            ino: Ino(10),
            kind: Kind::File,
            attr: Some(attr(10, Kind::File)),
        };
        names.list(listing, vec![entry], ms(100));
        assert_eq!(names.look(HOME, b"first", ms(200)), Known::Absent);
    }

    #[test]
    fn a_recall_ends_what_is_known_and_what_was_asked_before_it_gives_no_lease() {
        let names = whole(&[]);
        names.recall(Lease { directory: HOME, number: 1, sole: 0 }, ms(150));
        assert_eq!(names.look(HOME, b"missing", ms(151)), Known::Unknown);
        note_made(&names, "late", 12, 1, 2, ms(149));
        assert!(!names.has_leases(ms(151)), "the answer has overtaken the recall");
        note_made(&names, "new", 13, 2, 4, ms(152));
        assert!(names.has_leases(ms(153)));
    }

    #[test]
    fn after_a_change_of_unknown_outcome_no_lease_is_taken_before_the_server_knows_that_it_is_given_up() {
        let names = whole(&[]);
        let op = make(HOME, "perhaps", Kind::File);
        drop(names.begin_change(&op, SESSION, Sequence(5)));
        assert_eq!(names.look(HOME, b"perhaps", ms(151)), Known::Unknown);
        note_made(&names, "a", 12, 1, 2, ms(152));
        assert!(!names.has_leases(ms(153)));
        let outcome = Mutated::Inode { attr: attr(13, Kind::File), created: true };
        let told = Asked { at: ms(154), session: SESSION, answered_below: Sequence(6) };
        let lease = Lease { directory: HOME, number: 1, sole: 0 };
        names.note_change(&make(HOME, "b", Kind::File), &outcome, Position(3), &[lease], told);
        assert!(names.has_leases(ms(155)));
    }

    #[test]
    fn a_rename_that_may_have_left_both_names_is_not_guessed_at() {
        let names = whole(&[("there", 11)]);
        let linked = Attr { nlink: 2, ..attr(11, Kind::File) };
        let rename =
            |mode| Op::Rename { from: HOME, from_name: b"there".to_vec(), to: HOME, to_name: b"other".to_vec(), mode };
        let outcome = |moved| Mutated::Renamed { moved, replaced: None };
        names.note_change(
            &rename(RenameMode::Replace),
            &outcome(attr(11, Kind::File)),
            Position(2),
            &[],
            asked(ms(110)),
        );
        assert_eq!(names.look(HOME, b"there", ms(120)), Known::Absent);
        assert_eq!(names.look(HOME, b"other", ms(120)), Known::Present(attr(11, Kind::File), ms(10)));
        names.note_change(&rename(RenameMode::Replace), &outcome(linked), Position(3), &[], asked(ms(120)));
        assert_eq!(names.look(HOME, b"there", ms(130)), Known::Unknown);
        for mode in [RenameMode::Exchange, RenameMode::Whiteout] {
            let names = whole(&[("there", 11)]);
            names.note_change(&rename(mode), &outcome(attr(11, Kind::File)), Position(2), &[], asked(ms(110)));
            assert_eq!(names.look(HOME, b"there", ms(120)), Known::Unknown);
        }
    }

    #[test]
    fn attributes_are_as_new_as_the_last_answer_that_told_them() {
        let names = whole(&[("there", 11)]);
        let newer = Attr { size: 5, ctime: holdfast_common::Time { secs: 1, nanos: 0 }, ..attr(11, Kind::File) };
        names.note_attrs(&[&newer], ms(300));
        assert_eq!(names.look(HOME, b"there", ms(310)), Known::Present(newer, ms(10)));
        names.note_attrs(&[&attr(11, Kind::File)], ms(305));
        assert_eq!(names.look(HOME, b"there", ms(310)), Known::Present(newer, ms(10)), "an older one came late");
        names.distrust_attr(Ino(11), ms(320));
        assert_eq!(names.look(HOME, b"there", ms(330)), Known::Present(newer, ms(330)), "not to be believed");
        names.note_attrs(&[&newer], ms(319));
        assert_eq!(names.look(HOME, b"there", ms(330)), Known::Present(newer, ms(330)), "it was asked for before");
        names.note_attrs(&[&newer], ms(331));
        names.distrust_attrs(ms(335));
        names.note_attrs(&[&newer], ms(334));
        assert_eq!(names.look(HOME, b"there", ms(340)), Known::Present(newer, ms(340)));
        names.note_attrs(&[&newer], ms(336));
        assert_eq!(names.look(HOME, b"there", ms(340)), Known::Present(newer, ms(4)));
    }

    #[test]
    fn a_renames_answer_that_comes_late_does_not_make_attributes_older() {
        let names = whole(&[("there", 11)]);
        let stored = Attr { size: 5, ctime: holdfast_common::Time { secs: 9, nanos: 0 }, ..attr(11, Kind::File) };
        names.note_attrs(&[&stored], ms(120));
        let op = Op::Rename {
            from: HOME,
            from_name: b"there".to_vec(),
            to: HOME,
            to_name: b"other".to_vec(),
            mode: RenameMode::Replace,
        };
        let outcome = Mutated::Renamed { moved: attr(11, Kind::File), replaced: None };
        names.note_change(&op, &outcome, Position(2), &[], asked(ms(110)));
        assert_eq!(names.look(HOME, b"other", ms(130)), Known::Present(stored, ms(10)));
    }

    #[test]
    fn a_directory_that_has_become_too_large_is_not_whole_by_an_older_listing() {
        let names = Names::default();
        note_made(&names, "first", 10, 1, 1, ms(100));
        let listing = worth_listing(&names, ms(100));
        for number in 0..=DIRECTORY_NAMES_MAX as u64 {
            note_made(&names, &format!("n{number}"), 100 + number, 1, 10 + number, ms(200));
        }
        names.list(listing, Vec::new(), ms(101));
        assert_eq!(names.look(HOME, b"n5", ms(300)), Known::Unknown);
    }

    #[test]
    fn what_is_known_is_bounded() {
        let names = whole(&[]);
        for number in 0..3 * DIRECTORY_NAMES_MAX as u64 {
            note_made(&names, &format!("n{number}"), 100 + number, 1, 10 + number, ms(200));
            if number % 2 == 0 {
                let op = make(HOME, "d", Kind::Directory);
                let outcome = Mutated::Inode { attr: attr(1_000_000 + number, Kind::Directory), created: true };
                let lease = Lease { directory: Ino(1_000_000 + number), number: 5, sole: 0 };
                names.note_change(&op, &outcome, Position(10 + number), &[lease], asked(ms(200)));
            }
        }
        let state = names.0.lock();
        assert!(state.names <= NAMES_MAX && state.attrs.len() <= NAMES_MAX, "{} {}", state.names, state.attrs.len());
        assert!(state.directories.len() <= DIRECTORIES_MAX);
        assert_eq!(state.names, state.directories.values().map(|known| known.names.len()).sum::<usize>());
        drop(state);
        assert_eq!(names.look(HOME, b"missing", ms(300)), Known::Unknown, "too large to be known whole");
    }
}
