use proptest::prelude::*;

use super::*;

const INO: Ino = Ino(7);

fn owner(session: u64, class: LockClass, id: u64) -> LockOwner {
    LockOwner { session: SessionId(session), class, id }
}

fn lock(owner: LockOwner, first: u64, last: u64, kind: LockKind) -> Lock {
    Lock { owner, range: LockRange { first, last }, kind, pid: u32::try_from(owner.session.0).expect("small") + 1 }
}

fn process(session: u64) -> LockOwner {
    owner(session, LockClass::Process, 1)
}

fn exclusive(owner: LockOwner, first: u64, last: u64) -> Lock {
    lock(owner, first, last, LockKind::Exclusive)
}

fn shared(owner: LockOwner, first: u64, last: u64) -> Lock {
    lock(owner, first, last, LockKind::Shared)
}

fn ticket(session: u64, number: u64) -> Ticket {
    Ticket { session: SessionId(session), number }
}

#[test]
fn exclusive_excludes_shared_does_not() {
    let mut table = LockTable::default();
    assert_eq!(table.lock(INO, shared(process(1), 0, 9), None), Verdict::Granted);
    assert_eq!(table.lock(INO, shared(process(2), 5, 15), None), Verdict::Granted);
    let wanted = exclusive(process(2), 0, 3);
    assert_eq!(table.lock(INO, wanted, None), Verdict::Blocked(shared(process(1), 0, 9)));
    assert_eq!(table.test(INO, &wanted), Some(shared(process(1), 0, 9)));
    table.unlock(INO, process(1), LockRange { first: 0, last: 3 });
    assert_eq!(table.lock(INO, wanted, None), Verdict::Granted);
    assert_eq!(table.held_by(INO, process(1)).collect::<Vec<_>>(), [shared(process(1), 4, 9)]);
}

#[test]
fn flock_and_fcntl_are_independent_and_descriptions_are_not_of_processes() {
    let mut table = LockTable::default();
    let whole = |owner| Lock { range: LockRange::WHOLE, ..exclusive(owner, 0, 0) };
    assert_eq!(table.lock(INO, whole(process(1)), None), Verdict::Granted);
    assert_eq!(table.lock(INO, whole(owner(2, LockClass::Flock, 1)), None), Verdict::Granted);
    let description = whole(owner(1, LockClass::Description, 1));
    assert_eq!(table.lock(INO, description, None), Verdict::Blocked(whole(process(1))));
}

#[test]
fn waiters_are_served_in_their_order_and_all_that_can_be() {
    let mut table = LockTable::default();
    assert_eq!(table.lock(INO, exclusive(process(1), 0, 9), None), Verdict::Granted);
    assert_eq!(table.lock(INO, exclusive(process(2), 0, 9), Some(ticket(2, 1))), Verdict::Waiting);
    assert_eq!(table.lock(INO, shared(process(3), 5, 9), Some(ticket(3, 1))), Verdict::Waiting);
    assert_eq!(table.lock(INO, shared(process(4), 5, 9), Some(ticket(4, 1))), Verdict::Waiting);
    table.unlock(INO, process(1), LockRange::WHOLE);
    assert_eq!(table.take_woken(), [ticket(2, 1)]);
    table.unlock(INO, process(2), LockRange::WHOLE);
    assert_eq!(table.take_woken(), [ticket(3, 1), ticket(4, 1)]);
    assert!(!table.is_waiting(ticket(4, 1)) && !table.cancel(ticket(4, 1)));
}

#[test]
fn one_who_stops_waiting_is_not_served() {
    let mut table = LockTable::default();
    table.lock(INO, exclusive(process(1), 0, 9), None);
    assert_eq!(table.lock(INO, exclusive(process(2), 0, 9), Some(ticket(2, 1))), Verdict::Waiting);
    assert!(table.cancel(ticket(2, 1)));
    table.unlock(INO, process(1), LockRange::WHOLE);
    assert_eq!(table.take_woken(), []);
    assert_eq!(table.held().count(), 0);
    assert!(table.files.is_empty() && table.sessions.is_empty() && table.waits_of.is_empty());
}

#[test]
fn a_circle_of_processes_is_refused_and_one_of_descriptions_is_not_followed() {
    for (class, expected) in [(LockClass::Process, Verdict::Deadlock), (LockClass::Description, Verdict::Waiting)] {
        let mut table = LockTable::default();
        let who = |session| owner(session, class, 1);
        for session in 1..=3 {
            assert_eq!(table.lock(Ino(session), exclusive(who(session), 0, 0), None), Verdict::Granted);
        }
        assert_eq!(table.lock(Ino(2), exclusive(who(1), 0, 0), Some(ticket(1, 1))), Verdict::Waiting);
        assert_eq!(table.lock(Ino(3), exclusive(who(2), 0, 0), Some(ticket(2, 1))), Verdict::Waiting);
        assert_eq!(table.lock(Ino(1), exclusive(who(3), 0, 0), Some(ticket(3, 1))), expected);
    }
}

#[test]
fn two_that_share_and_both_want_more_are_a_circle_but_flock_lets_go_first() {
    let mut table = LockTable::default();
    for session in [1, 2] {
        table.lock(INO, shared(process(session), 0, 9), None);
    }
    assert_eq!(table.lock(INO, exclusive(process(1), 0, 9), Some(ticket(1, 1))), Verdict::Waiting);
    assert_eq!(table.lock(INO, exclusive(process(2), 0, 9), Some(ticket(2, 1))), Verdict::Deadlock);

    let flock = |session| owner(session, LockClass::Flock, 1);
    let whole = |session, kind| Lock { range: LockRange::WHOLE, ..lock(flock(session), 0, 0, kind) };
    for session in [1, 2] {
        assert_eq!(table.lock(INO, whole(session, LockKind::Shared), None), Verdict::Granted);
    }
    assert_eq!(table.lock(INO, whole(1, LockKind::Exclusive), Some(ticket(1, 2))), Verdict::Waiting);
    assert_eq!(table.lock(INO, whole(2, LockKind::Exclusive), None), Verdict::Blocked(whole(1, LockKind::Exclusive)));
    assert_eq!(table.take_woken(), [ticket(1, 2)]);
}

#[test]
fn a_session_that_ends_lets_go_of_everything() {
    let mut table = LockTable::default();
    for id in 0..3 {
        table.lock(Ino(id), exclusive(owner(1, LockClass::Process, id), 0, 9), None);
        assert_eq!(table.lock(Ino(id), exclusive(process(2), 0, 9), Some(ticket(2, id))), Verdict::Waiting);
        assert_eq!(
            table.lock(Ino(id), exclusive(process(1), 0, 9), Some(ticket(1, id))),
            if id == 1 { Verdict::Granted } else { Verdict::Waiting }
        );
    }
    table.end_session(SessionId(1));
    assert_eq!(table.take_woken(), [ticket(2, 0), ticket(2, 1), ticket(2, 2)]);
    assert!(table.held().all(|(_, lock)| lock.owner == process(2)));
    table.end_session(SessionId(2));
    assert!(table.files.is_empty() && table.sessions.is_empty() && table.total == 0);
}

#[test]
fn what_was_held_is_taken_back_unless_somebody_has_it() {
    let mut table = LockTable::default();
    assert!(table.restore(INO, exclusive(process(1), 0, 9)));
    assert!(!table.restore(INO, shared(process(2), 9, 20)));
    assert!(table.restore(INO, shared(process(2), 10, 20)));
}

#[test]
fn no_session_can_fill_the_table() {
    let mut table = LockTable::default();
    let mut granted = 0;
    while table.lock(INO, exclusive(process(1), granted * 2, granted * 2), None) == Verdict::Granted {
        granted += 1;
    }
    assert_eq!(granted, LOCKS_PER_SESSION_MAX as u64 - 1);
    assert_eq!(table.lock(INO, exclusive(process(2), 1, 1), None), Verdict::Granted);
    table.unlock(INO, process(1), LockRange::WHOLE);
    assert_eq!(table.lock(INO, exclusive(process(1), 0, 0), None), Verdict::Granted);
}

fn indexes(range: LockRange) -> std::ops::RangeInclusive<usize> {
    let index = |byte| usize::try_from(byte).expect("few bytes");
    index(range.first)..=index(range.last)
}

/// One byte at a time: who has it shared, who exclusively.
#[derive(Debug, Default)]
struct Model {
    bytes: [BTreeMap<LockOwner, LockKind>; 12],
}

impl Model {
    fn may(&self, wanted: &Lock) -> bool {
        self.span(wanted.range).all(|byte| {
            byte.iter().all(|(owner, kind)| {
                *owner == wanted.owner || (*kind == LockKind::Shared && wanted.kind == LockKind::Shared)
            })
        })
    }

    fn span(&self, range: LockRange) -> impl Iterator<Item = &BTreeMap<LockOwner, LockKind>> {
        self.bytes[indexes(range)].iter()
    }

    fn set(&mut self, range: LockRange, owner: LockOwner, kind: Option<LockKind>) {
        for byte in &mut self.bytes[indexes(range)] {
            match kind {
                Some(kind) => byte.insert(owner, kind),
                None => byte.remove(&owner),
            };
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Lock(u64, u64, u64, bool),
    Wait(u64, u64, u64, bool),
    Unlock(u64, u64, u64),
    End(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..12_u64, 0..12_u64).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        4 => (0..4_u64, range.clone(), any::<bool>()).prop_map(|(who, (a, b), x)| Step::Lock(who, a, b, x)),
        3 => (0..4_u64, range.clone(), any::<bool>()).prop_map(|(who, (a, b), x)| Step::Wait(who, a, b, x)),
        4 => (0..4_u64, range).prop_map(|(who, (a, b))| Step::Unlock(who, a, b)),
        1 => (0..4_u64).prop_map(Step::End),
    ]
}

proptest! {
    #[test]
    fn as_if_every_byte_were_locked_on_its_own(steps in prop::collection::vec(step(), 1..60)) {
        let mut table = LockTable::default();
        let mut model = Model::default();
        let mut waiting: BTreeMap<Ticket, Lock> = BTreeMap::new();
        let kind = |exclusive| if exclusive { LockKind::Exclusive } else { LockKind::Shared };
        for (number, step) in (1..).zip(steps) {
            match step {
                Step::Lock(who, first, last, x) => {
                    let wanted = lock(process(who), first, last, kind(x));
                    let granted = table.lock(INO, wanted, None) == Verdict::Granted;
                    prop_assert_eq!(granted, model.may(&wanted));
                    if granted {
                        model.set(wanted.range, wanted.owner, Some(wanted.kind));
                    }
                }
                Step::Wait(who, first, last, x) => {
                    let wanted = lock(process(who), first, last, kind(x));
                    match table.lock(INO, wanted, Some(ticket(who, number))) {
                        Verdict::Granted => {
                            prop_assert!(model.may(&wanted));
                            model.set(wanted.range, wanted.owner, Some(wanted.kind));
                        }
                        Verdict::Waiting => {
                            prop_assert!(!model.may(&wanted));
                            waiting.insert(ticket(who, number), wanted);
                        }
                        Verdict::Deadlock => prop_assert!(!waiting.is_empty() && !model.may(&wanted)),
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
                Step::Unlock(who, first, last) => {
                    table.unlock(INO, process(who), LockRange { first, last });
                    model.set(LockRange { first, last }, process(who), None);
                }
                Step::End(who) => {
                    table.end_session(SessionId(who));
                    model.set(LockRange { first: 0, last: 11 }, process(who), None);
                    waiting.retain(|ticket, _| ticket.session != SessionId(who));
                }
            }
            for ticket in table.take_woken() {
                let wanted = waiting.remove(&ticket).expect("only who waits is woken");
                prop_assert!(model.may(&wanted));
                model.set(wanted.range, wanted.owner, Some(wanted.kind));
            }
            // Nobody waits for nothing.
            for (ticket, wanted) in &waiting {
                prop_assert!(table.is_waiting(*ticket) && !model.may(wanted));
            }
            for (byte, held) in (0..).zip(&model.bytes) {
                for who in 0..4 {
                    let at = LockRange { first: byte, last: byte };
                    let is_here = |lock: &Lock| lock.range.first <= at.first && at.last <= lock.range.last;
                    let found = table.held_by(INO, process(who)).find(is_here).map(|lock| lock.kind);
                    prop_assert_eq!(found, held.get(&process(who)).copied());
                }
            }
        }
    }
}
