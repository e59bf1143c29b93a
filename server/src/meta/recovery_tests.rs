//! Mounts that outlive the power of their metadata server.

use super::*;

/// One mount, with what it remembers of what it has done.
struct Mount {
    session: SessionId,
    done: Vec<LostChange>,
}

impl Mount {
    async fn open(cluster: &Cluster, instance: u8) -> Self {
        let open = SessionRequest::Open { instance: [instance; 16], host: "host".into(), mountpoint: "/mnt".into() };
        match cluster.ask(MOUNT, MetaRequest::Session(open)).await {
            Ok(MetaAnswer::Session { session, .. }) => Self { session, done: Vec::new() },
            other => panic!("{other:?}"),
        }
    }

    async fn mutate(&mut self, cluster: &Cluster, op: Op) -> Mutated {
        let (session, sequence) = (self.session, Sequence(self.done.len() as u64 + 1));
        let request =
            MetaRequest::Mutate { session, sequence, answered_below: sequence, durable: false, op: op.clone() };
        let Ok(MetaAnswer::Mutated { position, outcome } | MetaAnswer::MutatedIn { position, outcome, .. }) =
            cluster.ask(MOUNT, request).await
        else {
            panic!("{op:?} is not done")
        };
        let (made, time) = match &outcome {
            Mutated::Inode { attr, created } => (created.then_some(attr.ino), Some(attr.ctime)),
            _ => (None, None),
        };
        self.done.push(LostChange { position, sequence, op, made, time });
        // Nobody here listens to recalls: leases run out before another mount goes on.
        cluster.clock.advance(Duration::from_secs(2));
        outcome
    }

    async fn make(&mut self, cluster: &Cluster, parent: Ino, name: &str, kind: Kind) -> Attr {
        match self.mutate(cluster, words::make(parent, name, kind)).await {
            Mutated::Inode { attr, .. } => attr,
            other => panic!("{other:?}"),
        }
    }

    async fn reopen(&self, cluster: &Cluster) -> Option<Position> {
        let reopen =
            SessionRequest::Reopen { session: self.session, opens: Vec::new(), instance: None, is_behind: false };
        match cluster.ask(MOUNT, MetaRequest::Session(reopen)).await {
            Ok(MetaAnswer::Reopened { replay_after }) => replay_after,
            other => panic!("{other:?}"),
        }
    }

    async fn replay(&self, cluster: &Cluster) -> Vec<Replayed> {
        let after = self.reopen(cluster).await.expect("the power was lost");
        self.say(cluster, after).await
    }

    /// What it had done after `after`, in two parts.
    async fn say(&self, cluster: &Cluster, after: Position) -> Vec<Replayed> {
        let lost: Vec<_> = self.done.iter().filter(|change| change.position > after).cloned().collect();
        let (head, tail) = lost.split_at(lost.len() / 2);
        let part = |part, changes: &[LostChange]| {
            let replay = SessionRequest::Replay { session: self.session, part, parts: 2, changes: changes.to_vec() };
            cluster.ask(MOUNT, MetaRequest::Session(replay))
        };
        let (tail, head) = tokio::join!(part(1, tail), part(0, head));
        let replayed = |answer| match answer {
            Ok(MetaAnswer::Replayed(replayed)) => replayed,
            other => panic!("{other:?}"),
        };
        [replayed(head), replayed(tail)].concat()
    }
}

async fn is_refused(cluster: &Cluster) -> bool {
    let attr = MetaRequest::Query { session: SessionId(0), query: Query::GetAttr { ino: Ino::ROOT } };
    matches!(cluster.ask(MOUNT, attr).await, Err(Refusal::Unavailable))
}

/// Two mounts whose changes hang together, none of them durable.
async fn history(cluster: &Cluster) -> (Mount, Mount, Attr, Attr) {
    let (mut a, mut b) = (Mount::open(cluster, 2).await, Mount::open(cluster, 3).await);
    let directory = a.make(cluster, Ino::ROOT, "d", Kind::Directory).await;
    let file = b.make(cluster, directory.ino, "f", Kind::File).await;
    a.mutate(cluster, cluster.put(file.ino, 1, &[1, 2, 3])).await;
    b.mutate(
        cluster,
        Op::Rename {
            from: directory.ino,
            from_name: b"f".to_vec(),
            to: Ino::ROOT,
            to_name: b"g".to_vec(),
            mode: RenameMode::Replace,
        },
    )
    .await;
    let last = a.make(cluster, directory.ino, "f", Kind::File).await;
    (a, b, file, last)
}

async fn assert_done_once(cluster: &Cluster, file: Attr, last: Attr) {
    assert_eq!(cluster.names(), BTreeSet::from(["d".into(), "g".into()]));
    let lookup = |parent, name: &str| {
        cluster.ask(
            MOUNT,
            MetaRequest::Query {
                session: SessionId(0),
                query: Query::Lookup { parent, name: name.as_bytes().to_vec() },
            },
        )
    };
    let Ok(MetaAnswer::Attr(found)) = lookup(Ino::ROOT, "g").await else { panic!("g is gone") };
    assert_eq!((found.ino, found.size, found.btime), (file.ino, 8, file.btime));
    let Ok(MetaAnswer::Attr(directory)) = lookup(Ino::ROOT, "d").await else { panic!("d is gone") };
    let Ok(MetaAnswer::Attr(found)) = lookup(directory.ino, "f").await else { panic!("d/f is gone") };
    assert_eq!(found.ino, last.ino);
    cluster.check();
}

#[tokio::test]
async fn what_a_power_cut_took_is_done_again_in_its_old_order_across_mounts() {
    for first in [0, 1] {
        let cluster = Cluster::new().await;
        cluster.core().until_durable(cluster.core().applied(), Duration::from_secs(10)).await.unwrap();
        let (a, b, file, last) = history(&cluster).await;
        let disk = cluster.disk.power_cut(first);
        let cluster = cluster.restarted(disk);
        assert!(!cluster.names().contains("g"), "the power cut took something");
        assert!(is_refused(&cluster).await, "nobody sees what is about to be overtaken");
        // The mount that the harness opened has nothing to say, and has to say so.
        let after = a.reopen(&cluster).await.expect("the power was lost");
        let quiet = Mount { session: cluster.session, done: Vec::new() };
        // The two come at different times, and the one that comes first waits for the other.
        let pause = |turn| tokio::time::sleep(Duration::from_millis(if turn == first { 0 } else { 100 }));
        let (from_a, from_b, from_quiet, ()) = tokio::join!(
            async {
                pause(0).await;
                a.replay(&cluster).await
            },
            async {
                pause(1).await;
                b.replay(&cluster).await
            },
            quiet.replay(&cluster),
            async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert!(is_refused(&cluster).await, "one is missing");
            }
        );
        assert_eq!(from_quiet, []);
        assert!(from_a.iter().chain(&from_b).all(|replayed| replayed.result.is_ok()), "{from_a:?} {from_b:?}");
        assert!(!is_refused(&cluster).await);
        assert_done_once(&cluster, file, last).await;
        assert_eq!(a.say(&cluster, after).await, from_a, "asked again, it gives the first answer");
        assert_eq!(a.reopen(&cluster).await, None);
        assert_done_once(&cluster, file, last).await;
    }
}

#[tokio::test]
async fn a_server_that_is_killed_while_it_waits_for_mounts_goes_on_waiting() {
    let cluster = Cluster::new().await;
    let (a, b, file, last) = history(&cluster).await;
    let disk = cluster.disk.power_cut(1);
    let cluster = cluster.restarted(disk);
    assert!(a.reopen(&cluster).await.is_some());
    let disk = cluster.disk.process_death();
    let cluster = cluster.restarted(disk);
    assert!(is_refused(&cluster).await);
    let quiet = Mount { session: cluster.session, done: Vec::new() };
    tokio::join!(a.replay(&cluster), b.replay(&cluster), quiet.replay(&cluster));
    assert_done_once(&cluster, file, last).await;
    // What is done again is as good as any other change.
    let disk = cluster.disk.process_death();
    let cluster = cluster.restarted(disk);
    assert_eq!(a.reopen(&cluster).await, None);
    // What the others may have told their programs is not waited for any longer.
    cluster.clock.advance(OLD_LEASES);
    assert_done_once(&cluster, file, last).await;
}

#[tokio::test]
async fn mounts_that_died_with_the_server_are_waited_for_only_so_long() {
    let cluster = Cluster::new().await;
    let (a, _dead, ..) = history(&cluster).await;
    let disk = cluster.disk.power_cut(1);
    let cluster = cluster.restarted(disk);
    let clock = Arc::clone(&cluster.clock);
    let (replayed, ()) = tokio::join!(a.replay(&cluster), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(is_refused(&cluster).await);
        clock.advance(Duration::from_secs(6));
    });
    assert!(!is_refused(&cluster).await);
    assert!(replayed.iter().all(|replayed| replayed.result.is_ok()), "{replayed:?}");
    assert_eq!(cluster.names(), BTreeSet::from(["d".into()]), "what the dead mount had done is gone");
    cluster.check();
}

#[tokio::test]
async fn a_mount_that_comes_too_late_has_its_changes_made_last_and_nothing_before() {
    let cluster = Cluster::new().await;
    let mut late = Mount::open(&cluster, 2).await;
    let made = late.make(&cluster, Ino::ROOT, "late", Kind::File).await;
    late.mutate(&cluster, cluster.put(made.ino, 1, &[1, 2, 3])).await;
    let disk = cluster.disk.power_cut(1);
    let mut cluster = cluster.restarted(disk);
    cluster.clock.advance(Duration::from_secs(6));
    cluster.until("the window is over", |cluster| !cluster.core().is_recovering()).await;
    // Nor may those that did not come rely on any lease still.
    cluster.clock.advance(OLD_LEASES);
    let harness = Mount { session: cluster.session, done: Vec::new() };
    harness.replay(&cluster).await;
    let other = cluster.create("other", false).await.unwrap();
    assert_ne!(made.ino, other, "a number that somebody may still know is given to nobody else");
    // Another life in between changes nothing.
    let disk = cluster.disk.process_death();
    let cluster = cluster.restarted(disk);
    // No name is changed before the leases of the last one have run out: not all mounts have noticed.
    cluster.clock.advance(Duration::from_secs(2));
    let (session, sequence) = (late.session, Sequence(9));
    let op = words::make(Ino::ROOT, "new", Kind::File);
    let mutate = MetaRequest::Mutate { session, sequence, answered_below: sequence, durable: false, op };
    for request in [mutate, MetaRequest::Barrier { session }] {
        assert_eq!(cluster.ask(MOUNT, request).await, Err(Refusal::Unavailable), "first what it owes");
    }
    let replayed = late.replay(&cluster).await;
    assert!(replayed.iter().all(|replayed| replayed.result.is_ok()), "{replayed:?}");
    assert_eq!(cluster.names(), BTreeSet::from(["late".into(), "other".into()]));
    assert!(cluster.ask(MOUNT, MetaRequest::Barrier { session }).await.is_ok());
    cluster.check();
}

#[tokio::test]
async fn who_owes_nothing_cannot_replay() {
    let cluster = Cluster::new().await;
    let session = cluster.session;
    let change = LostChange {
        position: Position(1 << 40),
        sequence: Sequence(77),
        op: words::make(Ino::ROOT, "a", Kind::File),
        made: Some(Ino(1 << 20)),
        time: None,
    };
    let replay = SessionRequest::Replay { session, part: 0, parts: 1, changes: vec![change] };
    assert_eq!(cluster.ask(MOUNT, MetaRequest::Session(replay)).await, Err(Refusal::Invalid));
    assert_eq!(cluster.names(), BTreeSet::new());
}

#[tokio::test]
async fn nobody_expires_while_everybody_waits() {
    let cluster = Cluster::new().await;
    let (a, b, file, last) = history(&cluster).await;
    let disk = cluster.disk.power_cut(1);
    let cluster = cluster.restarted(disk);
    let quiet = Mount { session: cluster.session, done: Vec::new() };
    assert!(b.reopen(&cluster).await.is_some(), "heard, so it is waited for until the session's timeout");
    tokio::join!(a.replay(&cluster), quiet.replay(&cluster), async {
        for _ in 0..59 {
            cluster.clock.advance(Duration::from_secs(1));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(is_refused(&cluster).await);
        b.replay(&cluster).await;
    });
    assert_done_once(&cluster, file, last).await;
    for mount in [&a, &b, &quiet] {
        assert!(cluster.core().sessions.lock().exists(mount.session));
    }
}

#[tokio::test]
async fn a_server_that_was_stopped_in_good_order_waits_for_nobody() {
    let mut cluster = Cluster::new().await;
    cluster.create("a", false).await.unwrap();
    let Cluster { running, disk, storages, clock, options, .. } = cluster;
    running.stop().await.unwrap();
    let disk = disk.power_cut(0);
    let again = start(&disk, &storages, &clock, &options).unwrap();
    assert!(!again.service.core.is_recovering());
    // Neither does one after it, though the last word of the first is no longer its own.
    drop(again);
    let again = start(&disk.power_cut(1), &storages, &clock, &options).unwrap();
    assert!(again.service.core.is_recovering(), "this one lost its power");
}

#[tokio::test]
async fn what_was_made_after_a_recovery_whose_end_is_lost_too_is_made_again_with_its_number() {
    let cluster = Cluster::new().await;
    let mut mount = Mount::open(&cluster, 7).await;
    let first = mount.make(&cluster, Ino::ROOT, "first", Kind::File).await;
    let cut = cluster.disk.power_cut(0);
    let cluster = cluster.restarted(cut);
    let quiet = Mount { session: cluster.session, done: Vec::new() };
    let (replayed, _) = tokio::join!(mount.replay(&cluster), quiet.replay(&cluster));
    assert!(replayed.iter().all(|replayed| replayed.result.is_ok()), "{replayed:?}");
    let second = mount.make(&cluster, Ino::ROOT, "second", Kind::File).await;
    // The beginning of the recovery is durable, and nothing since.
    let cut = cluster.disk.power_cut(0);
    let cluster = cluster.restarted(cut);
    let (replayed, _) = tokio::join!(mount.replay(&cluster), quiet.replay(&cluster));
    assert!(replayed.iter().all(|replayed| replayed.result.is_ok()), "{replayed:?}");
    for (name, attr) in [("first", first), ("second", second)] {
        let query = Query::Lookup { parent: Ino::ROOT, name: name.as_bytes().to_vec() };
        match cluster.ask(MOUNT, MetaRequest::Query { session: SessionId(0), query }).await {
            Ok(MetaAnswer::Attr(found)) => assert_eq!(found.ino, attr.ino, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    cluster.check();
}

#[tokio::test]
async fn what_comes_late_waits_for_the_leases_that_others_have_by_then() {
    let cluster = Cluster::new().await;
    let (mut a, mut late) = (Mount::open(&cluster, 2).await, Mount::open(&cluster, 3).await);
    let directory = a.make(&cluster, Ino::ROOT, "d", Kind::Directory).await;
    late.make(&cluster, directory.ino, "late", Kind::File).await;
    let disk = cluster.disk.power_cut(1);
    let cluster = cluster.restarted(disk);
    cluster.clock.advance(Duration::from_secs(6));
    cluster.until("the window is over", |cluster| !cluster.core().is_recovering()).await;
    // Nor may those that did not come rely on any lease still.
    cluster.clock.advance(OLD_LEASES);
    a.replay(&cluster).await;
    for (sequence, name) in [(2, "x"), (3, "y")] {
        let op = words::make(directory.ino, name, Kind::File);
        let (session, sequence) = (a.session, Sequence(sequence));
        let request = MetaRequest::Mutate { session, sequence, answered_below: sequence, durable: false, op };
        assert!(cluster.ask(MOUNT, request).await.is_ok(), "{name}");
    }
    let listen = |heard| {
        let (session, instance) = (a.session, cluster.running.service.instance);
        MetaRequest::Session(SessionRequest::Listen { session, heard, instance, since: Position(0) })
    };
    let (replayed, ()) = tokio::join!(late.replay(&cluster), async {
        let told = cluster.ask(MOUNT, listen(0)).await.unwrap();
        let MetaAnswer::Events(events) = &told else { panic!("{told:?}") };
        let [(number, Event::RecallLease(lease))] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!(lease.directory, directory.ino);
        assert_eq!(cluster.ask(MOUNT, listen(*number)).await, Ok(MetaAnswer::Events(Vec::new())));
    });
    assert!(replayed.iter().all(|replayed| replayed.result.is_ok()), "{replayed:?}");
}

#[tokio::test]
async fn names_are_told_when_every_mount_has_asked_for_what_its_programs_know() {
    let cluster = Cluster::new().await;
    let mut a = Mount::open(&cluster, 2).await;
    let directory = a.make(&cluster, Ino::ROOT, "d", Kind::Directory).await;
    let file = a.make(&cluster, directory.ino, "f", Kind::File).await;
    let quiet = cluster.session;
    let disk = cluster.disk.process_death();
    let cluster = cluster.restarted(disk);
    let ask = |request| cluster.ask(MOUNT, request);
    let reopen = |session, is_behind| {
        ask(MetaRequest::Session(SessionRequest::Reopen { session, opens: Vec::new(), instance: None, is_behind }))
    };
    let parent = directory.ino;
    let look = |session| ask(MetaRequest::Query { session, query: Query::Lookup { parent, name: b"f".to_vec() } });
    reopen(quiet, false).await.unwrap();
    assert_eq!(look(quiet).await, Err(Refusal::Unavailable), "the other has not said anything");
    reopen(a.session, true).await.unwrap();
    assert_eq!(look(quiet).await, Err(Refusal::Unavailable), "it is behind");
    assert_eq!(look(a.session).await, Ok(MetaAnswer::Attr(file)), "it need not wait for itself");
    let first = Sequence(a.done.len() as u64 + 1);
    let remove = |name: &[u8], ino| Op::Remove { parent, name: name.to_vec(), ino, time: Time::default() };
    let changes = vec![(first, remove(b"f", file.ino)), (Sequence(first.0 + 1), remove(b"f", file.ino))];
    let many = || MetaRequest::MutateMany { session: a.session, answered_below: first, changes: changes.clone() };
    let Ok(MetaAnswer::MutatedMany(made)) = ask(many()).await else { panic!("it was not removed") };
    assert!(made[0].is_ok());
    assert_eq!(made[1], Err(Refusal::NotFound));
    let Ok(MetaAnswer::MutatedMany(again)) = ask(many()).await else { panic!("it was not answered again") };
    let outcomes = |all: &[Result<Changed, Refusal>]| -> Vec<_> {
        all.iter().map(|one| one.as_ref().map(|changed| (changed.position, changed.outcome.clone())).ok()).collect()
    };
    assert_eq!(outcomes(&again), outcomes(&made));
    reopen(a.session, false).await.unwrap();
    assert_eq!(look(quiet).await, Err(Refusal::NotFound));
}
