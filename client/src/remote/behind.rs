//! Changes that this mount's programs know to be made and the metadata server does not yet: of names in directories that the mount has for itself
//! (`cache::names`). They are sent in their order, many in a message, while programs go on: what makes or removes a tree waits for no round trip. After
//! CephFS's asynchronous create and unlink (Layton, "Asynchronous directory operations in CephFS", 2020).
//!
//! Nothing that could be seen to come later is asked for before the server has made them: every other change, every barrier, every word about
//! locks, and the giving back of a lease waits for all that was begun before it; so does a question that could be answered otherwise.
//! A mount that dies takes with it what it had not sent: the last that was done, and nothing of it synced.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use holdfast_common::{
    Ino, SessionId, Time,
    wire::meta::{Mutated, Op, Query},
};
use parking_lot::Mutex;
use tokio::sync::watch;

/// Changes that the server has not made; past it, the next waits like any other.
const BEHIND_MAX: usize = 1024;
/// How far clocks may have gone apart between two changes.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Behind {
    queue: Mutex<Queue>,
    /// How many have been made, or could not be, since the beginning.
    ended: watch::Sender<u64>,
    clock: Mutex<Option<Heard>>,
    /// How many numbers have been chosen for new inodes, in which session.
    chosen: Mutex<(SessionId, u32)>,
}

/// What time it was at the server, and here by a clock that no suspension stops.
#[derive(Clone, Copy, Debug)]
struct Heard {
    there: Time,
    here: Duration,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Op>,
    /// How many that are not ended concern an inode.
    concerned: HashMap<Ino, u32>,
    begun: u64,
    ended: u64,
    is_being_sent: bool,
    /// A server that has restarted was told that there are some, and lets others wait for them.
    is_waited_for: bool,
    /// Some could not be made, and nobody has been told.
    has_failed: bool,
}

impl Default for Behind {
    fn default() -> Self {
        Self {
            queue: Mutex::default(),
            ended: watch::Sender::new(0),
            clock: Mutex::default(),
            chosen: Mutex::default(),
        }
    }
}

/// A directory and the inode that gets or loses its name in it.
fn concerned(op: &Op) -> impl Iterator<Item = Ino> {
    op.ahead().into_iter().flat_map(|((parent, _), ino)| [parent, ino])
}

impl Behind {
    pub fn has_room(&self) -> bool {
        let queue = self.queue.lock();
        queue.begun - queue.ended < BEHIND_MAX as u64
    }

    /// A number that nothing has had.
    pub fn choose(&self, session: SessionId) -> Option<Ino> {
        let mut chosen = self.chosen.lock();
        if chosen.0 != session {
            *chosen = (session, 0);
        }
        chosen.1 = chosen.1.checked_add(1)?;
        Ino::chosen(session, chosen.1)
    }

    /// Returns whether somebody has to begin to send.
    pub fn push(&self, op: Op) -> bool {
        let mut queue = self.queue.lock();
        queue.begun += 1;
        concerned(&op).for_each(|ino| *queue.concerned.entry(ino).or_default() += 1);
        queue.waiting.push_back(op);
        !std::mem::replace(&mut queue.is_being_sent, true)
    }

    /// The next, at most `max`. None: nobody sends any more.
    pub fn take(&self, max: usize) -> Vec<Op> {
        let mut queue = self.queue.lock();
        let count = queue.waiting.len().min(max);
        queue.is_being_sent = count > 0;
        queue.waiting.drain(..count).collect()
    }

    /// Is there any, as a server has to know that has restarted?
    pub fn say_if_any(&self) -> bool {
        let mut queue = self.queue.lock();
        queue.is_waited_for = queue.begun > queue.ended;
        queue.is_waited_for
    }

    /// Has a server to be told that there are none any more?
    pub fn is_waited_for(&self) -> bool {
        let queue = self.queue.lock();
        queue.is_waited_for && queue.begun == queue.ended
    }

    /// These, which were taken first, have been made, or could not be.
    pub fn end(&self, ops: &[Op], has_failed: bool) {
        let ended = {
            let mut queue = self.queue.lock();
            queue.has_failed |= has_failed;
            for ino in ops.iter().flat_map(concerned) {
                if let Some(count) = queue.concerned.get_mut(&ino) {
                    *count -= 1;
                    if *count == 0 {
                        queue.concerned.remove(&ino);
                    }
                }
            }
            queue.ended += ops.len() as u64;
            queue.ended
        };
        self.ended.send_replace(ended);
    }

    /// Could any not be made since this was last asked?
    pub fn take_failure(&self) -> bool {
        std::mem::take(&mut self.queue.lock().has_failed)
    }

    /// Ends when all that has been begun so far has ended.
    pub async fn settled(&self) {
        let begun = {
            let queue = self.queue.lock();
            if queue.begun == queue.ended {
                return;
            }
            queue.begun
        };
        let mut ended = self.ended.subscribe();
        // The sender lives as long as this does.
        let _ended = ended.wait_for(|ended| *ended >= begun).await;
    }

    /// As [`Behind::settled`], of what the answer to this question could depend on.
    pub async fn settled_for(&self, query: &Query) {
        if self.concerns(query) {
            self.settled().await;
        }
    }

    fn concerns(&self, query: &Query) -> bool {
        let queue = self.queue.lock();
        if queue.concerned.is_empty() {
            return false;
        }
        match query {
            // Answered with attributes of others than those that are named.
            Query::Lookup { .. } | Query::ReadDir { .. } => true,
            Query::StatFs | Query::ClusterMap { .. } => false,
            Query::GetAttr { ino }
            | Query::Open { ino, .. }
            | Query::ReadLink { ino }
            | Query::GetXattr { ino, .. }
            | Query::ListXattr { ino }
            | Query::Pieces { ino, .. }
            | Query::Seek { ino, .. } => queue.concerned.contains_key(ino),
        }
    }

    /// The server has made a change, and this was heard of it.
    pub fn note_time(&self, outcome: &Mutated, now: Duration) {
        // What was there already has an older time.
        let is_new = !matches!(outcome, Mutated::Inode { created: false, .. });
        let Some(there) = outcome.attrs().first().filter(|_| is_new).map(|attr| attr.ctime) else { return };
        // Nor is an answer of the time that is given again.
        let known = self.server_time(now);
        if known.is_none_or(|known| known <= there.after(CLOCK_SLACK)) {
            *self.clock.lock() = Some(Heard { there, here: now });
        }
    }

    /// The time at the server, or a little less. `None`: it was not heard of.
    pub fn server_time(&self, now: Duration) -> Option<Time> {
        let Heard { there, here } = (*self.clock.lock())?;
        Some(there.after(now.saturating_sub(here)))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn remove(parent: u64, ino: u64) -> Op {
        Op::Remove { parent: Ino(parent), name: vec![b'a'], ino: Ino(ino), time: Time::default() }
    }

    #[test]
    fn one_sends_until_nothing_is_left() {
        let behind = Behind::default();
        assert!(behind.push(remove(1, 2)), "somebody has to begin");
        assert!(!behind.push(remove(1, 3)));
        assert_eq!(behind.take(1), [remove(1, 2)]);
        assert_eq!(behind.take(9), [remove(1, 3)]);
        assert!(!behind.push(remove(1, 4)), "whoever sends will look again");
        assert_eq!(behind.take(9), [remove(1, 4)]);
        assert_eq!(behind.take(9), [], "and then ends");
        assert!(behind.push(remove(1, 5)));
    }

    #[test]
    fn who_waits_waits_for_what_was_begun_before() {
        let behind = Behind::default();
        assert!(behind.settled().now_or_never().is_some());
        behind.push(remove(1, 2));
        let taken = behind.take(9);
        let mut settled = Box::pin(behind.settled());
        assert!(settled.as_mut().now_or_never().is_none());
        behind.push(remove(1, 3));
        behind.end(&taken, false);
        assert!(settled.now_or_never().is_some(), "what comes later is not waited for");
        assert!(behind.settled().now_or_never().is_none());
    }

    #[test]
    fn a_question_waits_for_what_could_change_its_answer() {
        let behind = Behind::default();
        let waits = |query: Query| behind.settled_for(&query).now_or_never().is_none();
        let lookup = || Query::Lookup { parent: Ino(9), name: vec![b'x'] };
        let stat = |ino| Query::GetAttr { ino: Ino(ino) };
        assert!(!waits(lookup()));
        behind.push(remove(1, 2));
        assert_eq!([waits(stat(1)), waits(stat(2)), waits(stat(3))], [true, true, false]);
        assert!(waits(lookup()), "it is answered with attributes that may be changed");
        assert!(!waits(Query::StatFs));
        let taken = behind.take(9);
        behind.end(&taken, true);
        assert!(!waits(stat(1)));
        assert_eq!([behind.take_failure(), behind.take_failure()], [true, false]);
    }

    #[test]
    fn a_server_that_has_restarted_is_told_when_nothing_is_left() {
        let behind = Behind::default();
        assert!(!behind.say_if_any());
        behind.push(remove(1, 2));
        assert!(behind.say_if_any());
        assert!(!behind.is_waited_for(), "there is still one");
        let taken = behind.take(9);
        behind.end(&taken, false);
        assert!(behind.is_waited_for());
        assert!(!behind.say_if_any() && !behind.is_waited_for(), "it knows");
    }

    #[test]
    fn old_times_are_not_taken_for_the_time() {
        use holdfast_common::{Attr, Kind};
        let behind = Behind::default();
        let at = |secs, created| {
            let attr = Attr { ctime: Time { secs, nanos: 0 }, ..Attr::example(2, Kind::Directory) };
            Mutated::Inode { attr, created }
        };
        let now = Duration::from_secs(100);
        assert_eq!(behind.server_time(now), None);
        behind.note_time(&at(5000, true), now);
        behind.note_time(&at(10, false), now);
        behind.note_time(&at(4000, true), now);
        let later = now + Duration::from_secs(7);
        assert_eq!(behind.server_time(later), Some(Time { secs: 5007, nanos: 0 }));
        behind.note_time(&at(5009, true), later);
        assert_eq!(behind.server_time(later), Some(Time { secs: 5009, nanos: 0 }));
    }

    #[test]
    fn there_is_a_bound() {
        let behind = Behind::default();
        for ino in 0..BEHIND_MAX as u64 {
            assert!(behind.has_room());
            behind.push(remove(1, ino));
        }
        assert!(!behind.has_room());
        let taken = behind.take(1);
        behind.end(&taken, false);
        assert!(behind.has_room());
    }
}
