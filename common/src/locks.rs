//! Advisory locks on ranges of files, of both of Linux's kinds: who holds what, who waits, who is next. Pure.
//!
//! fcntl(2)'s locks (of processes and of open file descriptions) exclude each other; flock(2)'s are a space of their own, as on
//! ext4. Waiters are served in the order in which they came, each as soon as nothing that is held is in its way.

mod ranges;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use self::ranges::Ranges;
use crate::types::{Ino, SessionId};

/// Bytes `first..=last` of a file. To the end of the file, wherever that comes to lie: `last` is `LockRange::WHOLE.last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockRange {
    pub first: u64,
    pub last: u64,
}

impl LockRange {
    /// As the kernel says it: `OFFSET_MAX`.
    pub const WHOLE: Self = Self { first: 0, last: i64::MAX as u64 };

    pub fn is_valid(self) -> bool {
        self.first <= self.last && self.last <= Self::WHOLE.last
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LockKind {
    Shared,
    Exclusive,
}

/// Whose a lock is, and so what ends it and what it excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LockClass {
    /// fcntl(F_SETLK): a process's.
    Process,
    /// fcntl(F_OFD_SETLK): an open file description's.
    Description,
    /// flock(2): likewise, apart from the others.
    Flock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockOwner {
    pub session: SessionId,
    pub class: LockClass,
    /// Told apart by the mount.
    pub id: u64,
}

/// A lock that is held, or wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub owner: LockOwner,
    pub range: LockRange,
    pub kind: LockKind,
    /// The process that took it, as its own machine counts.
    pub pid: u32,
}

/// Somebody who waits for a lock: a number that its mount has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket {
    pub session: SessionId,
    pub number: u64,
}

/// What became of a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Granted,
    /// By this one, among others perhaps.
    Blocked(Lock),
    /// Under the ticket.
    Waiting,
    /// Whoever holds it waits for this process.
    Deadlock,
    /// No more are kept for this session, or for all.
    TooMany,
}

/// Locks that one session may hold and wait for, and all together: bounds the memory of who keeps them.
pub const LOCKS_PER_SESSION_MAX: usize = 1 << 18;
pub const LOCKS_TOTAL_MAX: usize = 1 << 22;

/// A process, as far as it is known: its mount, and its number there.
type Party = (SessionId, u32);

fn party(lock: &Lock) -> Party {
    (lock.owner.session, lock.pid)
}

/// A file, and which of its two spaces of locks.
type Place = (Ino, bool);

fn place(ino: Ino, class: LockClass) -> Place {
    (ino, class == LockClass::Flock)
}

#[derive(Debug, Default)]
struct FileLocks {
    held: BTreeMap<LockOwner, Ranges>,
    /// In the order in which they came.
    queue: BTreeMap<u64, (Ticket, Lock)>,
}

impl FileLocks {
    fn is_empty(&self) -> bool {
        self.held.is_empty() && self.queue.is_empty()
    }

    /// Locks of others that exclude `wanted`.
    fn in_the_way<'a>(&'a self, wanted: &'a Lock) -> impl Iterator<Item = Lock> + 'a {
        let others = self.held.iter().filter(|(owner, _)| **owner != wanted.owner);
        others.flat_map(move |(owner, ranges)| {
            ranges
                .overlapping(wanted.range)
                .filter(move |(_, kind, _)| *kind == LockKind::Exclusive || wanted.kind == LockKind::Exclusive)
                .map(move |(range, kind, pid)| Lock { owner: *owner, range, kind, pid })
        })
    }

    fn has_session(&self, session: SessionId) -> bool {
        let holds = self.held.range(first_owner(session)..).next().is_some_and(|(owner, _)| owner.session == session);
        holds || self.queue.values().any(|(ticket, _)| ticket.session == session)
    }
}

fn first_owner(session: SessionId) -> LockOwner {
    LockOwner { session, class: LockClass::Process, id: 0 }
}

/// All locks that somebody keeps.
#[derive(Debug, Default)]
pub struct LockTable {
    files: BTreeMap<Place, FileLocks>,
    waiting: BTreeMap<Ticket, (Place, u64)>,
    /// What each process waits for: it has threads.
    waits_of: BTreeMap<Party, BTreeSet<Ticket>>,
    sessions: BTreeMap<SessionId, Share>,
    total: usize,
    arrivals: u64,
    woken: Vec<Ticket>,
}

/// One session's part of the table.
#[derive(Debug, Default)]
struct Share {
    /// Ranges held, and waiters.
    count: usize,
    places: BTreeSet<Place>,
}

impl LockTable {
    /// Takes `wanted`, or changes what its owner holds into it. With a `ticket`, one that is in the way is waited for: `woken` tells
    /// when that has come to its end. A flock is let go before it is wanted in its other kind, as Linux does.
    pub fn lock(&mut self, ino: Ino, wanted: Lock, ticket: Option<Ticket>) -> Verdict {
        if !self.has_room(wanted.owner.session) {
            return Verdict::TooMany;
        }
        let place = place(ino, wanted.owner.class);
        if wanted.owner.class == LockClass::Flock && !self.holds(place, &wanted) {
            self.put(place, wanted.owner, wanted.range, None);
            self.serve(place);
        }
        let blocked = self.files.get(&place).and_then(|file| file.in_the_way(&wanted).next());
        match (blocked, ticket) {
            (None, _) => {
                self.put(place, wanted.owner, wanted.range, Some((wanted.kind, wanted.pid)));
                // It may have become less than it was.
                self.serve(place);
                Verdict::Granted
            }
            (Some(lock), None) => Verdict::Blocked(lock),
            (Some(_), Some(_)) if self.would_wait_for_itself(place, &wanted) => Verdict::Deadlock,
            (Some(_), Some(ticket)) => {
                self.enqueue(place, wanted, ticket);
                Verdict::Waiting
            }
        }
    }

    /// Lets go of what `owner` holds of `range`.
    pub fn unlock(&mut self, ino: Ino, owner: LockOwner, range: LockRange) {
        let place = place(ino, owner.class);
        self.put(place, owner, range, None);
        self.serve(place);
    }

    /// One that is in the way of `wanted`.
    pub fn test(&self, ino: Ino, wanted: &Lock) -> Option<Lock> {
        self.files.get(&place(ino, wanted.owner.class))?.in_the_way(wanted).next()
    }

    /// Takes back what was held before: `false` if somebody else holds it now.
    pub fn restore(&mut self, ino: Ino, lock: Lock) -> bool {
        let place = place(ino, lock.owner.class);
        let free = self.has_room(lock.owner.session) && self.test(ino, &lock).is_none();
        if free {
            self.put(place, lock.owner, lock.range, Some((lock.kind, lock.pid)));
        }
        free
    }

    /// Is exactly this held, perhaps as a part of more?
    pub fn is_held(&self, ino: Ino, lock: &Lock) -> bool {
        let covers = |held: Lock| {
            held.kind == lock.kind && held.range.first <= lock.range.first && lock.range.last <= held.range.last
        };
        self.held_by(ino, lock.owner).any(covers)
    }

    /// Keeps what somebody else has granted: nothing is tested, nobody is woken.
    pub fn record(&mut self, ino: Ino, lock: Lock) {
        self.put(place(ino, lock.owner.class), lock.owner, lock.range, Some((lock.kind, lock.pid)));
    }

    /// Stops waiting. `false`: it did not wait (any more).
    pub fn cancel(&mut self, ticket: Ticket) -> bool {
        self.dequeue(ticket).is_some()
    }

    pub fn is_waiting(&self, ticket: Ticket) -> bool {
        self.waiting.contains_key(&ticket)
    }

    /// Forgets all that the session held and waited for.
    pub fn end_session(&mut self, session: SessionId) {
        let tickets: Vec<Ticket> = self
            .waiting
            .range(Ticket { session, number: 0 }..=Ticket { session, number: u64::MAX })
            .map(|(t, _)| *t)
            .collect();
        for ticket in tickets {
            self.dequeue(ticket);
        }
        let places = self.sessions.get(&session).map(|share| share.places.clone()).unwrap_or_default();
        for place in places {
            let owners: Vec<LockOwner> = self.files.get(&place).map_or_else(Vec::new, |file| {
                file.held.range(first_owner(session)..).map(|(o, _)| *o).take_while(|o| o.session == session).collect()
            });
            owners.into_iter().for_each(|owner| self.put(place, owner, LockRange::WHOLE, None));
            self.serve(place);
        }
    }

    /// Waiters that have been granted what they wanted since this was last asked.
    pub fn take_woken(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.woken)
    }

    /// What `owner` holds of a file.
    pub fn held_by(&self, ino: Ino, owner: LockOwner) -> impl Iterator<Item = Lock> + '_ {
        let ranges = self.files.get(&place(ino, owner.class)).and_then(|file| file.held.get(&owner));
        ranges.into_iter().flat_map(Ranges::iter).map(move |(range, kind, pid)| Lock { owner, range, kind, pid })
    }

    /// What is held of a file, in both spaces.
    pub fn held_of(&self, ino: Ino) -> impl Iterator<Item = Lock> + '_ {
        [false, true].into_iter().filter_map(move |is_flock| self.files.get(&(ino, is_flock))).flat_map(|file| {
            file.held.iter().flat_map(|(owner, ranges)| {
                ranges.iter().map(|(range, kind, pid)| Lock { owner: *owner, range, kind, pid })
            })
        })
    }

    /// Does nobody but `session` hold or wait for anything on the file, and it wait for nothing?
    pub fn is_alone(&self, ino: Ino, session: SessionId) -> bool {
        [false, true]
            .into_iter()
            .filter_map(|is_flock| self.files.get(&(ino, is_flock)))
            .all(|file| file.queue.is_empty() && file.held.keys().all(|owner| owner.session == session))
    }

    /// Puts `locks` in the place of all that `session` holds of the file: it knows better. Then others are served. Returns whoever
    /// waits, over whatever others, for itself by that, and does not wait any more.
    pub fn replace(&mut self, ino: Ino, session: SessionId, locks: impl IntoIterator<Item = Lock>) -> Vec<Ticket> {
        for is_flock in [false, true] {
            let place = (ino, is_flock);
            let owners: Vec<LockOwner> = self.files.get(&place).map_or_else(Vec::new, |file| {
                file.held.keys().filter(|owner| owner.session == session).copied().collect()
            });
            owners.into_iter().for_each(|owner| self.put(place, owner, LockRange::WHOLE, None));
        }
        locks.into_iter().for_each(|lock| self.record(ino, lock));
        [false, true].into_iter().for_each(|is_flock| self.serve((ino, is_flock)));
        let place = (ino, false);
        let waiting: Vec<(Ticket, Lock)> =
            self.files.get(&place).map_or_else(Vec::new, |file| file.queue.values().copied().collect());
        let mut ended = Vec::new();
        for (ticket, wanted) in waiting {
            if self.would_wait_for_itself(place, &wanted) {
                self.dequeue(ticket);
                ended.push(ticket);
            }
        }
        ended
    }

    /// Everything that is held.
    pub fn held(&self) -> impl Iterator<Item = (Ino, Lock)> + '_ {
        self.files.iter().flat_map(|((ino, _), file)| {
            file.held.iter().flat_map(move |(owner, ranges)| {
                ranges.iter().map(move |(range, kind, pid)| (*ino, Lock { owner: *owner, range, kind, pid }))
            })
        })
    }

    /// Does `owner`'s lock cover the whole of what is wanted, in that kind? Of a flock, which is always of the whole file.
    fn holds(&self, place: Place, wanted: &Lock) -> bool {
        self.held_in(place, wanted.owner, wanted.range)
            .any(|(range, kind)| range == wanted.range && kind == wanted.kind)
    }

    fn held_in(&self, place: Place, owner: LockOwner, range: LockRange) -> impl Iterator<Item = (LockRange, LockKind)> {
        let ranges = self.files.get(&place).and_then(|file| file.held.get(&owner));
        ranges.into_iter().flat_map(move |ranges| ranges.overlapping(range)).map(|(range, kind, _)| (range, kind))
    }

    fn has_room(&self, session: SessionId) -> bool {
        let count = self.sessions.get(&session).map_or(0, |share| share.count);
        // One change makes two ranges of one at most.
        count + 2 <= LOCKS_PER_SESSION_MAX && self.total + 2 <= LOCKS_TOTAL_MAX
    }

    /// Grants what nothing is in the way of any more, oldest first.
    fn serve(&mut self, place: Place) {
        let mut after = 0;
        while let Some(file) = self.files.get(&place) {
            let next = file.queue.range(after..).find(|(_, (_, wanted))| file.in_the_way(wanted).next().is_none());
            let Some((&arrival, &(ticket, wanted))) = next else { break };
            // One who gives up exclusiveness with it may let in somebody who was passed over.
            let is_less =
                wanted.kind == LockKind::Shared && self.held_in(place, wanted.owner, wanted.range).next().is_some();
            after = if is_less { 0 } else { arrival + 1 };
            self.dequeue(ticket);
            self.put(place, wanted.owner, wanted.range, Some((wanted.kind, wanted.pid)));
            self.woken.push(ticket);
        }
    }

    fn put(&mut self, place: Place, owner: LockOwner, range: LockRange, what: Option<(LockKind, u32)>) {
        if what.is_none() && !self.files.contains_key(&place) {
            return;
        }
        let file = self.files.entry(place).or_default();
        let ranges = file.held.entry(owner).or_default();
        let before = ranges.len();
        ranges.set(range, what);
        let after = ranges.len();
        if after == 0 {
            file.held.remove(&owner);
        }
        self.count(owner.session, before, after);
        self.note_place(owner.session, place);
    }

    fn enqueue(&mut self, place: Place, wanted: Lock, ticket: Ticket) {
        self.dequeue(ticket);
        self.arrivals += 1;
        self.files.entry(place).or_default().queue.insert(self.arrivals, (ticket, wanted));
        self.waiting.insert(ticket, (place, self.arrivals));
        self.waits_of.entry(party(&wanted)).or_default().insert(ticket);
        self.count(ticket.session, 0, 1);
        self.note_place(ticket.session, place);
    }

    fn dequeue(&mut self, ticket: Ticket) -> Option<Lock> {
        let (place, arrival) = self.waiting.remove(&ticket)?;
        let (_, wanted) = self.files.get_mut(&place)?.queue.remove(&arrival)?;
        let party = party(&wanted);
        if let Some(waits) = self.waits_of.get_mut(&party) {
            waits.remove(&ticket);
            if waits.is_empty() {
                self.waits_of.remove(&party);
            }
        }
        self.count(ticket.session, 1, 0);
        self.note_place(ticket.session, place);
        Some(wanted)
    }

    fn count(&mut self, session: SessionId, before: usize, after: usize) {
        let share = self.sessions.entry(session).or_default();
        share.count = share.count + after - before;
        self.total = self.total + after - before;
    }

    /// Keeps the index of who has something where, and forgets files and sessions that have nothing.
    fn note_place(&mut self, session: SessionId, place: Place) {
        let has = self.files.get(&place).is_some_and(|file| file.has_session(session));
        let share = self.sessions.entry(session).or_default();
        if has {
            share.places.insert(place);
        } else {
            share.places.remove(&place);
        }
        if share.places.is_empty() {
            self.sessions.remove(&session);
        }
        if self.files.get(&place).is_some_and(FileLocks::is_empty) {
            self.files.remove(&place);
        }
    }

    /// Does somebody who is in the way wait, over whatever others, for the process that wants this? As in Linux only locks of
    /// processes are followed: a description's has no process that could be waiting. One without a number is nobody's.
    fn would_wait_for_itself(&self, place: Place, wanted: &Lock) -> bool {
        if wanted.owner.class != LockClass::Process || wanted.pid == 0 {
            return false;
        }
        let own = party(wanted);
        // A lock of its own that is just being let go is no circle.
        let mut to_visit = self.blockers(place, wanted);
        to_visit.retain(|blocker| *blocker != own);
        let mut visited = BTreeSet::new();
        while let Some(blocker) = to_visit.pop() {
            if blocker == own {
                return true;
            }
            if !visited.insert(blocker) {
                continue;
            }
            for ticket in self.waits_of.get(&blocker).into_iter().flatten() {
                let Some((place, arrival)) = self.waiting.get(ticket) else { continue };
                let waiting = self.files.get(place).and_then(|file| file.queue.get(arrival));
                to_visit.extend(waiting.map_or_else(Vec::new, |(_, wanted)| self.blockers(*place, wanted)));
            }
        }
        false
    }

    /// Processes whose locks are in the way.
    fn blockers(&self, place: Place, wanted: &Lock) -> Vec<Party> {
        let is_followed = |lock: &Lock| lock.owner.class == LockClass::Process && lock.pid != 0;
        let file = self.files.get(&place);
        file.map_or_else(Vec::new, |file| {
            file.in_the_way(wanted).filter(is_followed).map(|lock| party(&lock)).collect()
        })
    }
}
