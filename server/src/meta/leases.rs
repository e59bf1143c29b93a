//! Leases on directories: a mount that alone changes a directory may answer for the names in it from memory, because everybody else
//! who wants to change it waits until that mount has been told to stop, or its lease has run out.
//! After Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency" (SOSP 1989).
//!
//! A lease is given with the answers to the mount's own changes, for `DIRECTORY_LEASE` from when the change was *sent*; here it counts from
//! when the change was applied, so that it ends later than there. Its number stays the same for as long as nobody else has
//! changed the directory: under the same number, what the mount knew stays true even over a time without a lease.
//!
//! A *sole* lease is more: nobody else is told of names in the directory either, so its mount may say that names are gone before the server
//! knows (`client/remote/behind`). It is given while nobody else looks.
//!
//! This is memory, not state: a server that has restarted lets nobody change a directory before every mount has noticed that,
//! or the leases of its last life have run out.

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use holdfast_common::{Ino, SessionId, limits::DIRECTORY_LEASE, wire::meta::Lease};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How much longer a lease is here than at its mount: their clocks may run at different speeds.
const MARGIN: Duration = Duration::from_millis(125);
/// How long a server that has restarted has to reckon with leases of its last life.
pub const OLD_LEASES: Duration = DIRECTORY_LEASE.saturating_add(MARGIN);
/// Changes that one mount makes in a row, and nobody else in between, before it gets a lease on a directory that it has not made. Doubled
/// each time that the lease had to be recalled.
const ROW_BEFORE_LEASE: u32 = 2;
const RECALLS_COUNTED_MAX: u32 = 8;
/// Nobody has a directory for himself at which somebody else has looked within this.
const LOOKED_LATELY: Duration = Duration::from_secs(10);
/// Between two looks whether a change has been applied.
const SOON: Duration = Duration::from_millis(5);
/// Directories of which it is known who changes them, besides those that are being changed at the moment.
const DIRECTORIES_MAX: usize = 64 << 10;

/// Who changes which directories, and who may rely on it.
#[derive(Debug)]
pub struct Leases {
    table: Mutex<LeaseTable>,
    /// A lease has been given back.
    ended: Notify,
    /// By when those of the server's last life have run out.
    old_until: Mutex<Duration>,
}

/// Somebody changes directories: until this is dropped, others get no lease on them.
#[derive(Debug)]
pub struct ChangingNames {
    leases: Arc<Leases>,
    session: SessionId,
    directories: Vec<Ino>,
}

impl Drop for ChangingNames {
    fn drop(&mut self) {
        self.leases.table.lock().finish(self.session, &self.directories);
    }
}

impl Leases {
    /// Of a life of the server that begins now, by its clock.
    pub fn new(now: Duration) -> Self {
        Self { table: Mutex::default(), ended: Notify::new(), old_until: Mutex::new(now + OLD_LEASES) }
    }

    /// May a mount still rely on a lease of the server's last life, if not all have noticed that there is a new one?
    pub fn may_be_old(&self, now: Duration) -> bool {
        now < *self.old_until.lock()
    }

    /// Mounts can say only from now on what they have done under leases of the server's last life.
    pub fn await_old(&self, now: Duration) {
        *self.old_until.lock() = now + OLD_LEASES;
    }

    /// Returns when nobody but `session` has a lease on any of the directories, and nobody gets one: after as long as a lease lasts at most.
    /// `recall` tells a session that it has to give a lease back.
    pub async fn change(
        self: &Arc<Self>,
        session: SessionId,
        directories: Vec<Ino>,
        now: impl Fn() -> Duration,
        recall: impl Fn(SessionId, Lease),
    ) -> ChangingNames {
        self.table.lock().begin(session, &directories, now());
        let changing = ChangingNames { leases: Arc::clone(self), session, directories };
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            let at = now();
            let obstacles = self.table.lock().obstacles(session, &changing.directories, at);
            let Some(until) = obstacles.until else { return changing };
            obstacles.recalls.into_iter().for_each(|(holder, lease)| recall(holder, lease));
            wait_for(ended, until.saturating_sub(at)).await;
        }
    }

    /// Returns when nobody but `session` may know more of the names in the directory than the server. `recall` as in [`Leases::change`].
    pub async fn look(
        &self,
        session: SessionId,
        directory: Ino,
        now: impl Fn() -> Duration,
        recall: impl Fn(SessionId, Lease),
    ) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            let at = now();
            let obstacles = self.table.lock().look(session, directory, at);
            let Some(until) = obstacles.until else { return };
            obstacles.recalls.into_iter().for_each(|(holder, lease)| recall(holder, lease));
            wait_for(ended, until.saturating_sub(at)).await;
        }
    }

    /// A change of the session has been applied: of these directories, and `made` is a new one. The leases that it has now on them.
    pub fn applied(&self, session: SessionId, directories: &[Ino], made: Option<Ino>, now: Duration) -> Vec<Lease> {
        self.table.lock().applied(session, directories, made, now)
    }

    /// The mount does not rely on this lease any more.
    pub fn give_back(&self, session: SessionId, lease: Lease) {
        self.table.lock().give_back(session, lease);
        self.ended.notify_waiters();
    }

    /// The mount is gone, and has said so itself: one that is only silent may still rely on what it has.
    pub fn end(&self, session: SessionId) {
        self.table.lock().end(session);
        self.ended.notify_waiters();
    }
}

/// Whether the lease was given back or its time has come, the table says.
async fn wait_for(ended: impl Future<Output = ()>, patience: Duration) {
    let _either = tokio::time::timeout(patience, ended).await;
}

/// The rules. Time comes in.
#[derive(Debug, Default)]
pub struct LeaseTable {
    directories: HashMap<Ino, Directory>,
    numbers: u64,
    /// When those of no use were last forgotten because there were too many.
    swept: Option<Duration>,
}

#[derive(Debug)]
struct Directory {
    /// Who is about to change it, once for each change.
    changing: Vec<SessionId>,
    holder: Option<Holder>,
    /// Who changed it last, and how often in a row.
    last: SessionId,
    in_a_row: u32,
    recalls: u32,
    /// Somebody other than who changes it has looked at it: until then nobody has it for himself.
    looked_until: Duration,
}

#[derive(Debug)]
struct Holder {
    session: SessionId,
    number: u64,
    until: Duration,
    is_recalled: bool,
    /// As in [`Lease`].
    sole: u64,
}

impl Holder {
    fn lease(&self, directory: Ino) -> Lease {
        Lease { directory, number: self.number, sole: self.sole }
    }
}

/// What is in the way of a change.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Obstacles {
    /// The leases that their holders have not been told to give back yet.
    pub recalls: Vec<(SessionId, Lease)>,
    /// When the last of them ends at the latest. `None`: nothing is.
    pub until: Option<Duration>,
}

impl Default for Directory {
    fn default() -> Self {
        let (holder, looked_until) = (None, Duration::ZERO);
        Self { changing: Vec::new(), holder, last: SessionId(0), in_a_row: 0, recalls: 0, looked_until }
    }
}

impl Directory {
    fn is_changed_by_others(&self, session: SessionId) -> bool {
        self.changing.iter().any(|other| *other != session)
    }

    fn is_leased(&self, now: Duration) -> bool {
        self.holder.as_ref().is_some_and(|holder| now < holder.until)
    }

    fn note_change(&mut self, session: SessionId) {
        self.in_a_row = if self.last == session { self.in_a_row.saturating_add(1) } else { 1 };
        self.last = session;
    }

    /// What others held has ended or run out, or the change would not have been applied.
    fn lease(&mut self, session: SessionId, ino: Ino, now: Duration, numbers: &mut u64) -> Option<Lease> {
        if self.is_changed_by_others(session) || self.in_a_row < ROW_BEFORE_LEASE << self.recalls {
            return None;
        }
        let until = now + DIRECTORY_LEASE + MARGIN;
        let may_be_sole = now >= self.looked_until;
        match &mut self.holder {
            Some(holder) if holder.session == session && holder.is_recalled && now < holder.until => None,
            Some(holder) if holder.session == session && !holder.is_recalled => {
                // Who has it for himself keeps it so until somebody else looks.
                if holder.sole == 0 && may_be_sole {
                    *numbers += 1;
                    holder.sole = *numbers;
                }
                holder.until = until;
                Some(holder.lease(ino))
            }
            holder => {
                *numbers += 1;
                let sole = if may_be_sole { *numbers } else { 0 };
                let fresh = Holder { session, number: *numbers, until, is_recalled: false, sole };
                Some(holder.insert(fresh).lease(ino))
            }
        }
    }
}

impl LeaseTable {
    /// The session is about to change the directories. Followed by `finish`, whatever comes of it.
    pub fn begin(&mut self, session: SessionId, directories: &[Ino], now: Duration) {
        // What is being changed is kept in mind whether or not there is room: as many as there are requests.
        self.has_room(now);
        for ino in directories {
            self.directories.entry(*ino).or_default().changing.push(session);
        }
    }

    pub fn finish(&mut self, session: SessionId, directories: &[Ino]) {
        for ino in directories {
            let Some(directory) = self.directories.get_mut(ino) else { continue };
            if let Some(place) = directory.changing.iter().position(|other| *other == session) {
                directory.changing.swap_remove(place);
            }
        }
    }

    /// What keeps a change that has begun from being applied. Leases of others that have run out end.
    pub fn obstacles(&mut self, session: SessionId, directories: &[Ino], now: Duration) -> Obstacles {
        let mut obstacles = Obstacles::default();
        for ino in directories {
            let Some(directory) = self.directories.get_mut(ino) else { continue };
            let is_leased = directory.is_leased(now);
            let Some(holder) = directory.holder.as_mut().filter(|holder| holder.session != session) else { continue };
            if !is_leased {
                directory.holder = None;
                continue;
            }
            obstacles.until = obstacles.until.max(Some(holder.until));
            if !std::mem::replace(&mut holder.is_recalled, true) {
                obstacles.recalls.push((holder.session, holder.lease(*ino)));
                directory.recalls = (directory.recalls + 1).min(RECALLS_COUNTED_MAX);
            }
        }
        obstacles
    }

    /// What keeps the session from being told of names in the directory.
    pub fn look(&mut self, session: SessionId, ino: Ino, now: Duration) -> Obstacles {
        let Some(directory) = self.directories.get_mut(&ino) else { return Obstacles::default() };
        let is_leased = directory.is_leased(now);
        if directory.holder.as_ref().map_or(directory.last, |holder| holder.session) == session {
            return Obstacles::default();
        }
        directory.looked_until = now + LOOKED_LATELY;
        let Some(holder) = directory.holder.as_mut().filter(|holder| holder.sole > 0) else {
            return Obstacles::default();
        };
        if !is_leased {
            // What it has done under it has come, and waits to be applied.
            if directory.changing.contains(&holder.session) {
                return Obstacles { recalls: Vec::new(), until: Some(now + SOON) };
            }
            holder.sole = 0;
            return Obstacles::default();
        }
        let is_told = std::mem::replace(&mut holder.is_recalled, true);
        let recalls = if is_told { Vec::new() } else { vec![(holder.session, holder.lease(ino))] };
        Obstacles { recalls, until: Some(holder.until) }
    }

    /// See [`Leases::applied`]. In the order in which the changes were applied.
    pub fn applied(&mut self, session: SessionId, changed: &[Ino], made: Option<Ino>, now: Duration) -> Vec<Lease> {
        let mut leases = Vec::with_capacity(changed.len() + usize::from(made.is_some()));
        for ino in changed {
            let Some(directory) = self.directory(*ino, now) else { continue };
            directory.note_change(session);
            leases.extend(self.lease(session, *ino, now));
        }
        if let Some(ino) = made
            && let Some(directory) = self.directory(ino, now)
        {
            // Nobody else knows of it yet.
            (directory.last, directory.in_a_row) = (session, ROW_BEFORE_LEASE);
            leases.extend(self.lease(session, ino, now));
        }
        leases
    }

    fn lease(&mut self, session: SessionId, ino: Ino, now: Duration) -> Option<Lease> {
        self.directories.get_mut(&ino)?.lease(session, ino, now, &mut self.numbers)
    }

    /// What is known of the directory, if there is room to know anything.
    fn directory(&mut self, ino: Ino, now: Duration) -> Option<&mut Directory> {
        if !self.directories.contains_key(&ino) && !self.has_room(now) {
            return None;
        }
        Some(self.directories.entry(ino).or_default())
    }

    pub fn give_back(&mut self, session: SessionId, lease: Lease) {
        let Some(directory) = self.directories.get_mut(&lease.directory) else { return };
        directory.holder.take_if(|holder| (holder.session, holder.number) == (session, lease.number));
    }

    pub fn end(&mut self, session: SessionId) {
        for directory in self.directories.values_mut() {
            directory.holder.take_if(|holder| holder.session == session);
        }
    }

    /// Forgets what is of no use any more, at most as often as that can have changed.
    fn has_room(&mut self, now: Duration) -> bool {
        let is_full = self.directories.len() >= DIRECTORIES_MAX;
        if is_full && self.swept.is_none_or(|swept| now.saturating_sub(swept) >= MARGIN) {
            self.swept = Some(now);
            self.directories.retain(|_, directory| directory.is_leased(now) || !directory.changing.is_empty());
        }
        self.directories.len() < DIRECTORIES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const HOME: Ino = Ino(7);
    const MADE: Ino = Ino(8);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    async fn is_ready(future: std::pin::Pin<&mut impl Future>) -> bool {
        tokio::select! {
            biased;
            _ = future => true,
            () = std::future::ready(()) => false,
        }
    }

    /// One whole change of `HOME` that nothing is in the way of.
    fn change(table: &mut LeaseTable, session: SessionId, at: Duration) -> Option<u64> {
        table.begin(session, &[HOME], at);
        assert_eq!(table.obstacles(session, &[HOME], at), Obstacles::default());
        let leases = table.applied(session, &[HOME], None, at);
        table.finish(session, &[HOME]);
        leases.first().map(|lease| lease.number)
    }

    #[test]
    fn who_has_a_directory_for_himself_is_told_before_others_are_told_of_names() {
        let mut table = LeaseTable::default();
        let mine = |table: &mut LeaseTable, at| table.applied(A, &[HOME], None, at).first().copied();
        mine(&mut table, ms(0));
        let lease = mine(&mut table, ms(1)).expect("a lease");
        assert!(lease.sole > 0);
        assert_eq!(table.look(A, HOME, ms(2)), Obstacles::default(), "it may look itself");
        let until = Some(ms(1) + DIRECTORY_LEASE + MARGIN);
        assert_eq!(table.look(B, HOME, ms(2)), Obstacles { recalls: vec![(A, lease)], until });
        assert_eq!(table.look(B, HOME, ms(3)), Obstacles { recalls: Vec::new(), until }, "it is told once");
        table.give_back(A, lease);
        assert_eq!(table.look(B, HOME, ms(4)), Obstacles::default());
        let shared = mine(&mut table, ms(5)).expect("others only look, so there is a lease");
        assert_eq!(shared.sole, 0);
        assert_eq!(table.look(B, HOME, ms(6)), Obstacles::default());
        let again = mine(&mut table, ms(6) + LOOKED_LATELY).expect("a lease");
        assert!(again.sole > lease.sole);
    }

    #[test]
    fn whoever_looked_while_nobody_had_to_be_told_ends_what_only_one_knew() {
        let mut table = LeaseTable::default();
        let mine = |table: &mut LeaseTable, at| table.applied(A, &[HOME], None, at).first().copied();
        mine(&mut table, ms(0));
        let lease = mine(&mut table, ms(1)).expect("a lease");
        assert_eq!(mine(&mut table, ms(60_000)), Some(lease), "nobody has looked in that time without a lease");
        assert_eq!(table.look(B, HOME, ms(70_000)), Obstacles::default());
        let later = mine(&mut table, ms(70_000) + LOOKED_LATELY).expect("a lease");
        assert_eq!(later.number, lease.number, "nobody has changed it");
        assert!(later.sole > lease.sole);
    }

    #[test]
    fn who_changes_a_directory_twice_has_a_lease_under_one_number_for_as_long_as_nobody_else_does() {
        let mut table = LeaseTable::default();
        assert_eq!(change(&mut table, A, ms(0)), None);
        let number = change(&mut table, A, ms(1));
        assert!(number.is_some());
        assert_eq!(change(&mut table, A, ms(60_000)), number, "nobody has changed it in that time without a lease");
        assert_eq!(change(&mut table, B, ms(70_000)), None, "what has run out is in nobody's way");
        assert_eq!(change(&mut table, A, ms(70_001)), None);
        assert!(change(&mut table, A, ms(70_002)) > number);
    }

    #[test]
    fn who_makes_a_directory_has_a_lease_on_it_at_once() {
        let mut table = LeaseTable::default();
        let leases = table.applied(A, &[HOME], Some(MADE), ms(0));
        assert_eq!(leases, [Lease { directory: MADE, number: 1, sole: 1 }]);
    }

    #[test]
    fn a_change_waits_for_the_lease_of_another_until_that_is_given_back_or_has_run_out_here() {
        let mut table = LeaseTable::default();
        table.applied(A, &[HOME], Some(MADE), ms(0));
        let lease = Lease { directory: MADE, number: 1, sole: 1 };
        table.begin(B, &[MADE], ms(0));
        let until = Some(DIRECTORY_LEASE + MARGIN);
        assert_eq!(table.obstacles(B, &[MADE], ms(1)), Obstacles { recalls: vec![(A, lease)], until });
        assert_eq!(table.obstacles(B, &[MADE], ms(2)), Obstacles { recalls: Vec::new(), until }, "told once");
        table.give_back(B, lease);
        table.give_back(A, Lease { number: 2, ..lease });
        assert_eq!(table.obstacles(B, &[MADE], ms(3)).until, until, "not theirs to give back");
        table.give_back(A, lease);
        assert_eq!(table.obstacles(B, &[MADE], ms(4)), Obstacles::default());
        let mut table = LeaseTable::default();
        table.applied(A, &[HOME], Some(MADE), ms(0));
        table.begin(B, &[MADE], ms(0));
        assert_eq!(table.obstacles(B, &[MADE], DIRECTORY_LEASE).until, until, "the mount's clock may be slower");
        assert_eq!(table.obstacles(B, &[MADE], DIRECTORY_LEASE + MARGIN), Obstacles::default());
    }

    #[test]
    fn nobody_gets_a_lease_or_keeps_it_longer_while_another_is_about_to_change_the_directory() {
        let mut table = LeaseTable::default();
        table.applied(A, &[HOME], Some(MADE), ms(0));
        table.begin(B, &[MADE], ms(0));
        assert_eq!(table.applied(A, &[MADE], None, ms(900)), []);
        assert_eq!(table.obstacles(B, &[MADE], DIRECTORY_LEASE + MARGIN), Obstacles::default());
        assert_eq!(table.applied(A, &[MADE], None, ms(1200)), [], "nor anew");
        table.finish(B, &[MADE]);
        assert_ne!(table.applied(A, &[MADE], None, ms(1300)), [], "who has given up is not in the way");
    }

    #[test]
    fn a_recalled_lease_is_not_kept_longer_even_if_nobody_waits_any_more() {
        let mut table = LeaseTable::default();
        table.applied(A, &[HOME], Some(MADE), ms(0));
        table.begin(B, &[MADE], ms(0));
        assert_eq!(table.obstacles(B, &[MADE], ms(1)).recalls.len(), 1);
        table.finish(B, &[MADE]);
        for at in [2, 3, 4] {
            assert_eq!(table.applied(A, &[MADE], None, ms(at)), []);
        }
        table.give_back(A, Lease { directory: MADE, number: 1, sole: 1 });
        assert_eq!(table.applied(A, &[MADE], None, ms(5)), [Lease { directory: MADE, number: 2, sole: 2 }]);
    }

    #[test]
    fn each_recall_doubles_how_long_a_row_the_next_lease_takes() {
        let mut table = LeaseTable::default();
        let mut rows = Vec::new();
        for round in 0..4 {
            let mut row = 0;
            let number = loop {
                row += 1;
                if let Some(number) = change(&mut table, A, ms(round)) {
                    break number;
                }
            };
            rows.push(row);
            table.begin(B, &[HOME], ms(round));
            assert_eq!(table.obstacles(B, &[HOME], ms(round)).recalls.len(), 1);
            table.give_back(A, Lease { directory: HOME, number, sole: number });
            table.applied(B, &[HOME], None, ms(round));
            table.finish(B, &[HOME]);
        }
        assert_eq!(rows, [2, 4, 8, 16]);
    }

    #[test]
    fn what_is_kept_in_mind_is_bounded_and_those_of_no_use_make_room() {
        let mut table = LeaseTable::default();
        let directories = DIRECTORIES_MAX as u64;
        for ino in 0..directories + 10 {
            table.applied(A, &[], Some(Ino(1000 + ino)), ms(0));
        }
        assert_eq!(table.directories.len(), DIRECTORIES_MAX);
        assert_eq!(table.applied(A, &[], Some(Ino(1)), ms(1)), [], "no room");
        assert_ne!(table.applied(A, &[], Some(Ino(1)), DIRECTORY_LEASE * 2), []);
        assert_eq!(table.directories.len(), 1);
        let mut table = LeaseTable::default();
        for ino in 0..directories * 2 {
            let changed = [Ino(1000 + ino)];
            table.begin(A, &changed, ms(ino));
            table.applied(A, &changed, None, ms(ino));
            table.finish(A, &changed);
        }
        assert!(table.directories.len() <= DIRECTORIES_MAX + 200, "{}", table.directories.len());
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_the_lease_is_given_back() {
        let leases = Arc::new(Leases::new(ms(0)));
        leases.applied(A, &[HOME], Some(MADE), ms(0));
        let recalled = Mutex::new(Vec::new());
        let recall = |session, lease| {
            recalled.lock().push((session, lease));
        };
        let waiting = leases.change(B, vec![MADE], || ms(1), recall);
        tokio::pin!(waiting);
        assert!(!is_ready(waiting.as_mut()).await);
        let told = recalled.lock().clone();
        assert_eq!(told, [(A, Lease { directory: MADE, number: 1, sole: 1 })]);
        leases.give_back(A, told[0].1);
        drop(waiting.await);
        assert_eq!(leases.applied(A, &[MADE], None, ms(2)), [], "it has been recalled once");
    }

    #[tokio::test]
    async fn who_has_gone_by_its_own_word_is_not_waited_for() {
        let leases = Arc::new(Leases::new(ms(0)));
        leases.applied(A, &[HOME], Some(MADE), ms(0));
        leases.end(A);
        let never = |_, _| panic!("nobody is there to be told");
        let free = std::pin::pin!(leases.change(B, vec![MADE], || ms(1), never));
        assert!(is_ready(free).await);
    }

    #[test]
    fn leases_of_a_servers_last_life_may_hold_for_as_long_as_leases_do() {
        let leases = Leases::new(ms(500));
        assert!(leases.may_be_old(ms(500) + DIRECTORY_LEASE));
        assert!(!leases.may_be_old(ms(500) + DIRECTORY_LEASE + MARGIN));
    }
}
