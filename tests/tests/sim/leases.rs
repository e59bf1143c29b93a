//! Leases on directories, both halves: the server's table and the mounts' memory of names, with messages that take long, overtake each other and
//! get lost, clocks that run at different speeds, mounts that give up and a server that restarts. Whatever a mount says
//! without asking has to be what the server would say at that moment. One seed is one run; nothing here waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use holdfast_client::cache::names::{Asked, Known, Listing, Names, Pending};
use holdfast_common::{
    Attr, DirEntry, Ino, Kind, Position, Sequence, SessionId, Time,
    wire::meta::{Lease, Mutated, NewInode, Op, RenameMode},
};
use holdfast_server::meta::leases::{LeaseTable, OLD_LEASES};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

const MOUNTS: usize = 3;
const HOME: Ino = Ino(1);
const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];
const STEPS: u32 = 1500;
/// Entries in one page of a listing: few, so that much happens between two.
const PAGE: usize = 2;

/// What is left out, to show that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// A change does not wait for the leases of others.
    NoWaiting,
    /// A mount goes on relying on a lease whose recall it has heard of.
    DeafMount,
    /// A lease counts from when its answer arrives.
    LateClock,
    /// What was given up counts as refused.
    HopefulGivingUp,
    /// The server does not know who is about to change a directory.
    NoBeginning,
    /// A mount does not notice that the server has restarted.
    UnnoticedRestart,
    /// A restarted server changes names at once.
    HastyRestart,
}

#[derive(Clone, Debug)]
struct Entry {
    ino: Ino,
    kind: Kind,
    cookie: u64,
}

struct Underway<'a> {
    op: Op,
    asked: Asked,
    changing: Pending<'a>,
}

struct Mount<'a> {
    names: &'a Names,
    /// In thousandths: how fast its clock runs.
    speed: u64,
    instance: u64,
    next: u64,
    underway: BTreeMap<u64, Underway<'a>>,
}

#[derive(Clone, Debug)]
struct Made {
    outcome: Mutated,
    position: Position,
    leases: Vec<Lease>,
}

/// `None`: it was refused.
type Answer = Option<Box<Made>>;

#[derive(Clone, Debug)]
enum Mail {
    Mutate { mount: usize, sequence: u64, answered_below: u64, op: Op },
    Answer { mount: usize, sequence: u64, answer: Answer, instance: u64 },
    Recall { mount: usize, lease: Lease, instance: u64 },
    Heard { mount: usize, lease: Lease, instance: u64 },
    List { mount: usize, listing: Listing, asked: Duration, after: u64, listed: Vec<DirEntry> },
    Listed { mount: usize, listing: Listing, asked: Duration, listed: Vec<DirEntry>, instance: u64 },
    Hello { mount: usize, instance: u64 },
    Confirm { mount: usize, instance: u64 },
}

struct World<'a> {
    random: StdRng,
    flaw: Option<Flaw>,
    /// True time in milliseconds.
    now: u64,
    mail: BTreeMap<(u64, u64), Mail>,
    sent: u64,
    mounts: Vec<Mount<'a>>,
    // The server.
    table: LeaseTable,
    instance: u64,
    started: u64,
    confirmed: BTreeSet<usize>,
    tree: BTreeMap<(Ino, Vec<u8>), Entry>,
    position: u64,
    waiting: Vec<(usize, u64, Op)>,
    /// On their way to the one that applies: nothing was in the way when they set out.
    cleared: Vec<(usize, u64, Op)>,
    replies: BTreeMap<(usize, u64), Answer>,
    answered_below: [u64; MOUNTS],
    // What was seen.
    from_memory: u64,
    lies: Vec<String>,
}

fn session(mount: usize) -> SessionId {
    SessionId(u64::try_from(mount).unwrap_or(0) + 1)
}

fn attr(ino: Ino, kind: Kind, position: u64) -> Attr {
    let time = Time { secs: position.cast_signed(), nanos: 0 };
    Attr {
        ino,
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        nlink: 1,
        size: 0,
        stored: 0,
        rdev: 0,
        atime: time,
        mtime: time,
        ctime: time,
        btime: time,
        data_version: 0,
    }
}

/// Does the change concern the name?
fn touches(op: &Op, directory: Ino, name: &[u8]) -> bool {
    match op {
        Op::Make { parent, name: own, .. } | Op::Unlink { parent, name: own } | Op::Rmdir { parent, name: own } => {
            *parent == directory && own == name
        }
        Op::Rename { from, from_name, to, to_name, .. } => {
            (*from == directory && from_name == name) || (*to == directory && to_name == name)
        }
        _ => false,
    }
}

impl<'a> World<'a> {
    fn new(seed: u64, flaw: Option<Flaw>, names: &'a [Names]) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mounts = names
            .iter()
            .map(|names| Mount {
                names,
                speed: random.random_range(950..1050),
                instance: 1,
                next: 1,
                underway: BTreeMap::new(),
            })
            .collect();
        Self {
            random,
            flaw,
            now: 10_000,
            mail: BTreeMap::new(),
            sent: 0,
            mounts,
            table: LeaseTable::default(),
            instance: 1,
            started: 0,
            confirmed: (0..MOUNTS).collect(),
            tree: BTreeMap::new(),
            position: 0,
            waiting: Vec::new(),
            cleared: Vec::new(),
            replies: BTreeMap::new(),
            answered_below: [1; MOUNTS],
            from_memory: 0,
            lies: Vec::new(),
        }
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    fn server_now(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn mount_now(&self, mount: usize) -> Duration {
        Duration::from_micros(self.now * self.mounts[mount].speed)
    }

    fn send(&mut self, mail: Mail) {
        let delay = match self.random.random_range(0..10) {
            0 => self.random.random_range(100..1500),
            _ => self.random.random_range(1..30),
        };
        self.sent += 1;
        self.mail.insert((self.now + delay, self.sent), mail);
    }

    fn run(mut self) -> (u64, Vec<String>) {
        for _ in 0..STEPS {
            self.now += self.random.random_range(0..8);
            while let Some(((at, _), _)) = self.mail.first_key_value()
                && *at <= self.now
                && let Some((_, mail)) = self.mail.pop_first()
            {
                self.deliver(mail);
            }
            self.serve_waiting();
            // Mostly one mount works, as in life; else there would never be a lease.
            let mount = if self.random.random_bool(0.85) {
                usize::try_from(self.now / 700).unwrap_or(0) % MOUNTS
            } else {
                self.random.random_range(0..MOUNTS)
            };
            match self.random.random_range(0..100) {
                0..=44 => self.look(mount),
                45..=97 => self.mutate(mount),
                98 => self.give_up(mount),
                _ if self.random.random_bool(0.3) => self.restart(),
                _ => {}
            }
        }
        (self.from_memory, self.lies)
    }

    fn some_place(&mut self) -> (Ino, Vec<u8>) {
        let directories: Vec<Ino> = std::iter::once(HOME)
            .chain(self.tree.values().filter(|entry| entry.kind == Kind::Directory).map(|entry| entry.ino))
            .collect();
        let directory = directories[self.random.random_range(0..directories.len())];
        (directory, NAMES[self.random.random_range(0..NAMES.len())].to_vec())
    }

    fn look(&mut self, mount: usize) {
        let (directory, name) = self.some_place();
        let now = self.mount_now(mount);
        let truth = self.tree.get(&(directory, name.clone())).map(|entry| entry.ino);
        let said = match self.mounts[mount].names.look(directory, &name, now) {
            Known::Unknown => return,
            Known::WorthListing(listing) => {
                return self.send(Mail::List { mount, listing, asked: now, after: 0, listed: Vec::new() });
            }
            Known::Absent => None,
            Known::Present(attr, _) => Some(attr.ino),
        };
        self.from_memory += 1;
        let is_own = self.mounts[mount].underway.values().any(|underway| touches(&underway.op, directory, &name));
        if said != truth && !is_own {
            let name = String::from_utf8_lossy(&name).into_owned();
            self.lies.push(format!(
                "at {} mount {mount} says {said:?} of {name} in {directory}, which is {truth:?}",
                self.now
            ));
        }
    }

    fn mutate(&mut self, mount: usize) {
        let (parent, name) = self.some_place();
        let op = match (self.tree.get(&(parent, name.clone())), self.random.random_range(0..4)) {
            (Some(entry), 0..=2) if entry.kind == Kind::Directory => Op::Rmdir { parent, name },
            (Some(_), 0..=1) => Op::Unlink { parent, name },
            (Some(_), _) => {
                let (to, to_name) = self.some_place();
                Op::Rename { from: parent, from_name: name, to, to_name, mode: RenameMode::Replace }
            }
            (None, kind) => {
                let kind = if kind == 0 && parent == HOME { Kind::Directory } else { Kind::File };
                let new = NewInode { kind, mode: 0o755, uid: 0, gid: 0, rdev: 0, target: Vec::new() };
                Op::Make { parent, name, new, exclusive: true, open: false }
            }
        };
        let at = self.mount_now(mount);
        let state = &mut self.mounts[mount];
        let sequence = state.next;
        state.next += 1;
        let changing = state.names.begin_change(&op, session(mount), Sequence(sequence));
        let answered_below = state.underway.first_key_value().map_or(sequence, |(first, _)| *first);
        let asked = Asked { at, session: session(mount), answered_below: Sequence(answered_below) };
        state.underway.insert(sequence, Underway { op, asked, changing });
        self.ask(mount, sequence);
    }

    fn ask(&mut self, mount: usize, sequence: u64) {
        let underway = &self.mounts[mount].underway;
        let answered_below = underway.first_key_value().map_or(sequence, |(first, _)| *first);
        let op = underway[&sequence].op.clone();
        self.send(Mail::Mutate { mount, sequence, answered_below, op });
    }

    fn give_up(&mut self, mount: usize) {
        let sequences: Vec<u64> = self.mounts[mount].underway.keys().copied().collect();
        let Some(sequence) = sequences.choose(&mut self.random) else { return };
        let given_up = self.mounts[mount].underway.remove(sequence);
        if self.has(Flaw::HopefulGivingUp)
            && let Some(given_up) = given_up
        {
            given_up.changing.settle();
        }
    }

    fn restart(&mut self) {
        self.table = LeaseTable::default();
        self.instance += 1;
        self.started = self.now;
        self.waiting.clear();
        self.cleared.clear();
        self.confirmed.clear();
        for mount in 0..MOUNTS {
            self.send(Mail::Hello { mount, instance: self.instance });
            let lost: Vec<u64> = self.mounts[mount].underway.keys().copied().collect();
            lost.into_iter().for_each(|sequence| self.ask(mount, sequence));
        }
    }

    fn notice(&mut self, mount: usize, instance: u64) {
        if self.mounts[mount].instance < instance {
            self.mounts[mount].instance = instance;
            let now = self.mount_now(mount);
            if !self.has(Flaw::UnnoticedRestart) {
                self.mounts[mount].names.distrust(now);
            }
            self.send(Mail::Confirm { mount, instance });
        }
    }

    fn deliver(&mut self, mail: Mail) {
        match mail {
            Mail::Mutate { mount, sequence, answered_below, op } => self.admit(mount, sequence, answered_below, op),
            Mail::Answer { mount, sequence, answer, instance } => {
                self.notice(mount, instance);
                self.hear_answer(mount, sequence, &answer);
            }
            Mail::Recall { mount, lease, instance } => {
                self.notice(mount, instance);
                let now = self.mount_now(mount);
                if !self.has(Flaw::DeafMount) {
                    self.mounts[mount].names.recall(lease, now);
                }
                self.send(Mail::Heard { mount, lease, instance });
            }
            Mail::Heard { mount, lease, instance } if instance == self.instance => {
                self.table.give_back(session(mount), lease);
            }
            Mail::List { mount, listing, asked, after, listed } => self.list(mount, listing, asked, after, listed),
            Mail::Listed { mount, listing, asked, listed, instance } => {
                self.notice(mount, instance);
                self.mounts[mount].names.list(listing, listed, asked);
            }
            Mail::Hello { mount, instance } => self.notice(mount, instance),
            Mail::Confirm { mount, instance } if instance == self.instance => drop(self.confirmed.insert(mount)),
            Mail::Heard { .. } | Mail::Confirm { .. } => {}
        }
    }

    fn hear_answer(&mut self, mount: usize, sequence: u64, answer: &Answer) {
        // Some are lost, and asked for again.
        if self.random.random_bool(0.03) && self.mounts[mount].underway.contains_key(&sequence) {
            return self.ask(mount, sequence);
        }
        let now = self.mount_now(mount);
        let late_clock = self.has(Flaw::LateClock);
        let state = &mut self.mounts[mount];
        let Some(Underway { op, asked, changing }) = state.underway.remove(&sequence) else { return };
        if let Some(Made { outcome, position, leases }) = answer.as_deref() {
            let asked = if late_clock { Asked { at: now, ..asked } } else { asked };
            state.names.note_change(&op, outcome, *position, leases, asked);
        }
        changing.settle();
    }

    fn list(&mut self, mount: usize, listing: Listing, asked: Duration, after: u64, mut listed: Vec<DirEntry>) {
        let mut rest: Vec<DirEntry> = self
            .tree
            .iter()
            .filter(|((directory, _), entry)| *directory == listing.directory && entry.cookie > after)
            .map(|((_, name), entry)| DirEntry {
                cookie: entry.cookie,
                name: name.clone(),
                ino: entry.ino,
                kind: entry.kind,
                attr: Some(attr(entry.ino, entry.kind, self.position)),
            })
            .collect();
        rest.sort_by_key(|entry| entry.cookie);
        let is_end = rest.len() <= PAGE;
        rest.truncate(PAGE);
        listed.extend(rest);
        let instance = self.instance;
        match listed.last() {
            Some(last) if !is_end => {
                let after = last.cookie;
                self.send(Mail::List { mount, listing, asked, after, listed });
            }
            _ => self.send(Mail::Listed { mount, listing, asked, listed, instance }),
        }
    }

    fn admit(&mut self, mount: usize, sequence: u64, answered_below: u64, op: Op) {
        self.answered_below[mount] = self.answered_below[mount].max(answered_below);
        if self.waiting.iter().chain(&self.cleared).any(|(other, known, _)| (*other, *known) == (mount, sequence)) {
            return;
        }
        if let Some(answer) = self.replies.get(&(mount, sequence)).cloned() {
            // No lease goes with an answer that is given again.
            let answer = answer.map(|made| Box::new(Made { leases: Vec::new(), ..*made }));
            return self.send(Mail::Answer { mount, sequence, answer, instance: self.instance });
        }
        if !self.has(Flaw::NoBeginning) {
            self.table.begin(session(mount), &op.directories(), self.server_now());
        }
        self.waiting.push((mount, sequence, op));
    }

    fn serve_waiting(&mut self) {
        let is_settled =
            self.confirmed.len() == MOUNTS || self.server_now() >= Duration::from_millis(self.started) + OLD_LEASES;
        if !is_settled && !self.has(Flaw::HastyRestart) {
            return;
        }
        for (mount, sequence, op) in std::mem::take(&mut self.waiting) {
            let now = self.server_now();
            let directories = op.directories();
            let obstacles = self.table.obstacles(session(mount), &directories, now);
            for (holder, lease) in obstacles.recalls {
                let holder = usize::try_from(holder.0).unwrap() - 1;
                self.send(Mail::Recall { mount: holder, lease, instance: self.instance });
            }
            match obstacles.until.is_some() && !self.has(Flaw::NoWaiting) {
                true => self.waiting.push((mount, sequence, op)),
                false => self.cleared.push((mount, sequence, op)),
            }
        }
        for (mount, sequence, op) in std::mem::take(&mut self.cleared) {
            if self.random.random_bool(0.3) {
                self.cleared.push((mount, sequence, op));
                continue;
            }
            let directories = op.directories();
            let answer = if sequence < self.answered_below[mount] { None } else { self.apply(mount, &op) };
            self.table.finish(session(mount), &directories);
            self.replies.insert((mount, sequence), answer.clone());
            self.send(Mail::Answer { mount, sequence, answer, instance: self.instance });
        }
    }

    fn apply(&mut self, mount: usize, op: &Op) -> Answer {
        let outcome = self.change(op)?;
        let made = op.made_directory(&outcome);
        let leases = self.table.applied(session(mount), &op.directories(), made, self.server_now());
        Some(Box::new(Made { outcome, position: Position(self.position), leases }))
    }

    fn change(&mut self, op: &Op) -> Option<Mutated> {
        let (position, is_there) = (self.position + 1, |ino: Ino, tree: &BTreeMap<(Ino, Vec<u8>), Entry>| {
            ino == HOME || tree.values().any(|entry| entry.ino == ino)
        });
        let outcome = match op {
            Op::Make { parent, name, new, .. } => {
                let place = (*parent, name.clone());
                if !is_there(*parent, &self.tree) || self.tree.contains_key(&place) {
                    return None;
                }
                let ino = Ino(100 + position);
                self.tree.insert(place, Entry { ino, kind: new.kind, cookie: position });
                Mutated::Inode { attr: attr(ino, new.kind, position), created: true }
            }
            Op::Unlink { parent, name } | Op::Rmdir { parent, name } => {
                let place = (*parent, name.clone());
                let entry = self.tree.get(&place)?.clone();
                let is_rmdir = matches!(op, Op::Rmdir { .. });
                let is_empty = !self.tree.keys().any(|(directory, _)| *directory == entry.ino);
                if (entry.kind == Kind::Directory) != is_rmdir || !is_empty {
                    return None;
                }
                self.tree.remove(&place);
                Mutated::Removed { attr: Attr { nlink: 0, ..attr(entry.ino, entry.kind, position) } }
            }
            Op::Rename { from, from_name, to, to_name, .. } => {
                let (source, target) = ((*from, from_name.clone()), (*to, to_name.clone()));
                let entry = self.tree.get(&source)?.clone();
                let taken = self.tree.get(&target).cloned();
                let is_file = |entry: &Entry| entry.kind == Kind::File;
                if source == target || !is_there(*to, &self.tree) || !is_file(&entry) || !taken.iter().all(is_file) {
                    return None;
                }
                self.tree.remove(&source);
                let moved = attr(entry.ino, entry.kind, position);
                self.tree.insert(target, Entry { cookie: position, ..entry });
                Mutated::Renamed { moved, replaced: taken.map(|taken| attr(taken.ino, taken.kind, position)) }
            }
            _ => return None,
        };
        self.position = position;
        Some(outcome)
    }
}

/// How often a mount answered by itself, and what was not true of it.
fn run(seed: u64, flaw: Option<Flaw>) -> (u64, Vec<String>) {
    let names: Vec<Names> = std::iter::repeat_with(Names::default).take(MOUNTS).collect();
    World::new(seed, flaw, &names).run()
}

#[test]
fn what_a_mount_says_without_asking_is_what_the_server_would_say() {
    let mut from_memory = 0;
    for seed in 0..2000 {
        let (count, lies) = run(seed, None);
        assert_eq!(lies, Vec::<String>::new(), "seed {seed}");
        from_memory += count;
    }
    assert!(from_memory > 20_000, "only {from_memory} answers came from memory: that proves little");
}

#[test]
fn each_rule_is_needed() {
    for flaw in [
        Flaw::NoWaiting,
        Flaw::DeafMount,
        Flaw::LateClock,
        Flaw::HopefulGivingUp,
        Flaw::NoBeginning,
        Flaw::UnnoticedRestart,
        Flaw::HastyRestart,
    ] {
        let convicted = (0..2000).any(|seed| !run(seed, Some(flaw)).1.is_empty());
        assert!(convicted, "{flaw:?} is not noticed");
    }
}
