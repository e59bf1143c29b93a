//! Every interleaving of what can happen to one block, with the decisions of the state machine itself: what a file can reach is
//! never deleted (I4). Each rule is shown to be needed by a variant without it, which the same search convicts.
//!
//! The world: two servers, two mounts that put the block and commit it, orders to delete and to copy that may arrive at any time and
//! any number of times, a metadata server that loses what was not durable.

#![expect(clippy::cast_possible_truncation, reason = "all numbers here are below ten")]

use std::collections::{HashSet, VecDeque};

use holdfast_common::{Epoch, ServerId};

use super::super::{
    garbage::{admitted, counts},
    rows::BlockRow,
};

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// A commit may name what is condemned.
    CommitsIgnoreCondemnation,
    /// A commit of a block that is named already may bring copies with earlier stamps.
    LiveBlocksTakeAnyStamp,
    /// A commit of an unknown block is not held against what was forgotten.
    NothingIsRemembered,
    /// Servers delete whatever they are told to.
    DeletesIgnoreStamps,
    /// A put of a block that is there already leaves its stamp as it is.
    PutsKeepOldStamps,
    /// Orders to delete go out before the condemnation is durable.
    DeletesGoOutEarly,
    /// Copies are made without a stamp.
    CopiesHaveNoStamp,
    /// Made copies are put on record whatever their stamp.
    CopiesAlwaysCount,
}

const SERVERS: [usize; 2] = [0, 1];
const EPOCH_MAX: u64 = 2;

/// What a search goes through.
#[derive(Clone, Copy, Debug)]
struct Scope {
    flaw: Flaw,
    /// Of each mount.
    puts: [u8; 2],
    /// The second server may be taken off the record, and get a copy again.
    copies: bool,
}

impl Scope {
    fn puts(flaw: Flaw) -> Self {
        Self { flaw, puts: [2, 2], copies: false }
    }

    fn copies(flaw: Flaw) -> Self {
        Self { flaw, puts: [1, 1], copies: true }
    }
}

/// What the metadata server knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Meta {
    /// References, holders (a bit each), epoch, condemned.
    row: Option<(bool, u8, u64, bool)>,
    epoch: u64,
    forgotten: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Mount {
    /// The epoch that it has heard of.
    heard: u64,
    /// Under which it is putting, and where it has (a bit each).
    putting: Option<(u64, u8)>,
    puts: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    meta: Meta,
    durable: Meta,
    /// The stamp of each server's copy.
    copies: [Option<u64>; 2],
    mounts: [Mount; 2],
    /// Orders to delete that are under way: at each epoch, to whom (a bit each), and who has confirmed.
    deletes: [(u8, u8); EPOCH_MAX as usize + 1],
    /// Orders to copy, under way or carried out, to each server, with each stamp.
    orders: [u8; 2],
    copied: [u8; 2],
    /// Epochs at which the second server's copy was one too many, and has not been ordered to go yet.
    surplus: u8,
}

impl World {
    fn new() -> Self {
        let meta = Meta { row: None, epoch: 0, forgotten: 0 };
        let mount = Mount { heard: 0, putting: None, puts: 0 };
        Self {
            durable: meta.clone(),
            meta,
            copies: [None; 2],
            mounts: [mount; 2],
            deletes: [(0, 0); EPOCH_MAX as usize + 1],
            orders: [0; 2],
            copied: [0; 2],
            surplus: 0,
        }
    }

    /// Everything that can happen next.
    fn next(&self, scope: Scope) -> Vec<Self> {
        let mut next = Vec::new();
        self.mounts_act(scope, &mut next);
        self.metadata_acts(scope, &mut next);
        self.servers_act(scope.flaw, &mut next);
        next
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut world = self.clone();
        change(&mut world);
        world
    }

    fn mounts_act(&self, Scope { flaw, puts, .. }: Scope, next: &mut Vec<Self>) {
        for (who, mount) in self.mounts.iter().enumerate() {
            if mount.heard < self.meta.epoch {
                next.push(self.with(|world| world.mounts[who].heard = self.meta.epoch));
            }
            match mount.putting {
                None if mount.puts < puts[who] => next.push(self.with(|world| {
                    world.mounts[who].puts += 1;
                    world.mounts[who].putting = Some((mount.heard, 0));
                })),
                None => {}
                Some((epoch, done)) => {
                    for server in SERVERS.into_iter().filter(|server| done & 1 << server == 0) {
                        next.push(self.with(|world| {
                            world.put(server, epoch, flaw);
                            world.mounts[who].putting = Some((epoch, done | 1 << server));
                        }));
                    }
                    if done == 0b11 {
                        next.push(self.with(|world| world.commit(who, epoch, flaw)));
                    }
                }
            }
        }
    }

    fn put(&mut self, server: usize, epoch: u64, flaw: Flaw) {
        let stamp = &mut self.copies[server];
        *stamp = match *stamp {
            Some(old) if flaw == Flaw::PutsKeepOldStamps => Some(old),
            old => Some(old.unwrap_or(0).max(epoch)),
        };
    }

    fn commit(&mut self, who: usize, epoch: u64, flaw: Flaw) {
        self.mounts[who].putting = None;
        let old = self.meta.row.map(as_row);
        let (mut claimed, mut forgotten) = (epoch, self.meta.forgotten);
        match (&old, flaw) {
            (Some(row), Flaw::CommitsIgnoreCondemnation) if row.condemned => claimed = u64::MAX,
            (Some(row), Flaw::LiveBlocksTakeAnyStamp) if !row.condemned => claimed = u64::MAX,
            (None, Flaw::NothingIsRemembered) => forgotten = 0,
            _ => {}
        }
        if let Ok(row) = admitted(old.as_ref(), 8, Epoch(claimed), Epoch(forgotten)) {
            self.meta.row = Some((true, holders_of(&row) | 0b11, row.epoch.0, false));
        }
    }

    fn metadata_acts(&self, Scope { flaw, copies, .. }: Scope, next: &mut Vec<Self>) {
        if self.meta != self.durable {
            next.push(self.with(|world| world.durable = world.meta.clone()));
            if self.meta.epoch < EPOCH_MAX {
                next.push(self.with(|world| {
                    let epoch = world.meta.epoch + 1;
                    world.meta = world.durable.clone();
                    world.meta.epoch = epoch;
                }));
            }
        }
        let Some((named, holders, epoch, condemned)) = self.meta.row else { return };
        if named {
            next.push(self.with(|world| world.meta.row = Some((false, holders, epoch, condemned))));
            if copies {
                self.holders_change(flaw, next);
            }
        } else if !condemned && self.meta.epoch < EPOCH_MAX {
            next.push(self.with(|world| {
                world.meta.epoch += 1;
                world.meta.row = Some((false, holders, world.meta.epoch, true));
            }));
        }
        if condemned {
            self.collect(flaw, next);
        }
    }

    fn collect(&self, flaw: Flaw, next: &mut Vec<Self>) {
        let Some((_, holders, epoch, _)) = self.meta.row else { return };
        let (sent, confirmed) = self.deletes[epoch as usize];
        if sent & holders != holders && (self.durable.row == self.meta.row || flaw == Flaw::DeletesGoOutEarly) {
            next.push(self.with(|world| world.deletes[epoch as usize].0 |= holders));
        }
        if confirmed & holders == holders {
            next.push(self.with(|world| {
                world.meta.row = None;
                world.meta.forgotten = world.meta.forgotten.max(epoch);
            }));
        }
    }

    /// A server is taken off the record, and gets a copy again.
    fn holders_change(&self, flaw: Flaw, next: &mut Vec<Self>) {
        let Some((named, holders, epoch, condemned)) = self.meta.row else { return };
        let (server, bit) = (1, 1 << 1);
        if holders & bit != 0 {
            next.push(self.with(|world| world.meta.row = Some((named, holders & !bit, epoch, condemned))));
        } else {
            next.push(self.with(|world| world.orders[server] |= 1 << epoch));
            if self.meta.epoch < EPOCH_MAX {
                // What it has is one too many.
                next.push(self.with(|world| {
                    world.meta.epoch += 1;
                    world.meta.row = Some((named, holders, world.meta.epoch, condemned));
                    world.surplus |= 1 << world.meta.epoch;
                }));
            }
            for epoch in (1..=EPOCH_MAX).filter(|epoch| self.surplus & 1 << epoch != 0) {
                let is_durable = self.durable.epoch >= epoch && self.durable.row.is_some_and(|row| row.2 >= epoch);
                if is_durable || flaw == Flaw::DeletesGoOutEarly {
                    next.push(self.with(|world| {
                        world.surplus &= !(1 << epoch);
                        world.deletes[epoch as usize].0 |= bit;
                    }));
                }
            }
            if self.durable.row == self.meta.row {
                next.push(self.with(|world| world.replace_disk(server)));
            }
        }
        for stamp in (0..=EPOCH_MAX).filter(|stamp| self.copied[server] & 1 << stamp != 0) {
            let row = as_row((named, holders, epoch, condemned));
            if counts(&row, Epoch(stamp)) || flaw == Flaw::CopiesAlwaysCount {
                next.push(self.with(|world| {
                    world.copied[server] &= !(1 << stamp);
                    world.meta.row = Some((named, holders | bit, epoch, condemned));
                }));
            }
        }
    }

    /// What was on it counts nowhere: it has another boot id.
    fn replace_disk(&mut self, server: usize) {
        self.copies[server] = None;
        self.copied[server] = 0;
        self.mounts.iter_mut().filter_map(|mount| mount.putting.as_mut()).for_each(|(_, done)| *done &= !(1 << server));
    }

    fn servers_act(&self, flaw: Flaw, next: &mut Vec<Self>) {
        for server in SERVERS {
            for epoch in 0..=EPOCH_MAX {
                if self.deletes[epoch as usize].0 & 1 << server != 0 {
                    next.push(self.with(|world| world.delete(server, epoch, flaw)));
                }
                // From itself, or from the other.
                if self.orders[server] & 1 << epoch != 0 && self.copies.iter().any(Option::is_some) {
                    next.push(self.with(|world| {
                        let stamp = if flaw == Flaw::CopiesHaveNoStamp { 0 } else { epoch };
                        world.orders[server] &= !(1 << epoch);
                        world.put(server, stamp, Flaw::None);
                        world.copied[server] |= 1 << epoch;
                    }));
                }
            }
        }
    }

    fn delete(&mut self, server: usize, epoch: u64, flaw: Flaw) {
        let goes = self.copies[server].is_some_and(|stamp| stamp < epoch || flaw == Flaw::DeletesIgnoreStamps);
        if goes {
            self.copies[server] = None;
        }
        self.deletes[epoch as usize].1 |= 1 << server;
    }

    /// Is something gone that can be reached now, or after a loss of power?
    fn is_lost(&self) -> bool {
        let lost = |meta: &Meta| {
            let Some((true, holders, ..)) = meta.row else { return false };
            SERVERS.iter().any(|server| holders & 1 << server != 0 && self.copies[*server].is_none())
        };
        lost(&self.meta) || lost(&self.durable)
    }
}

fn as_row((named, holders, epoch, condemned): (bool, u8, u64, bool)) -> BlockRow {
    let holders = SERVERS.iter().filter(|server| holders & 1 << **server != 0).map(|server| ServerId(*server as u32));
    let (refs, holders) = (u64::from(named), holders.collect());
    BlockRow { refs, holders, condemned, ..BlockRow::new(8, Epoch(epoch)) }
}

fn holders_of(row: &BlockRow) -> u8 {
    row.holders.iter().fold(0, |bits, server| bits | 1 << server.0)
}

/// How many states there are, and a way to a loss, if there is one.
fn search(scope: Scope) -> (usize, Option<World>) {
    let mut seen = HashSet::from([World::new()]);
    let mut waiting = VecDeque::from([World::new()]);
    while let Some(world) = waiting.pop_front() {
        if seen.len() > 20_000_000 {
            panic!("too many");
        }
        if world.is_lost() {
            return (seen.len(), Some(world));
        }
        for next in world.next(scope) {
            if seen.insert(next.clone()) {
                waiting.push_back(next);
            }
        }
    }
    (seen.len(), None)
}

#[test]
fn no_interleaving_deletes_what_a_file_can_reach() {
    for scope in [Scope::puts(Flaw::None), Scope::copies(Flaw::None)] {
        let (states, lost) = search(scope);
        assert_eq!(lost, None, "{scope:?}");
        assert!(states > 50_000, "only {states} states: the model does not do what it should");
    }
}

#[test]
fn without_any_one_of_the_rules_something_is_lost() {
    for scope in [
        Scope::puts(Flaw::CommitsIgnoreCondemnation),
        Scope { puts: [2, 1], ..Scope::copies(Flaw::LiveBlocksTakeAnyStamp) },
        Scope::puts(Flaw::NothingIsRemembered),
        Scope::puts(Flaw::DeletesIgnoreStamps),
        Scope::puts(Flaw::PutsKeepOldStamps),
        Scope::puts(Flaw::DeletesGoOutEarly),
        Scope::copies(Flaw::CopiesHaveNoStamp),
        Scope::copies(Flaw::CopiesAlwaysCount),
    ] {
        let (states, lost) = search(scope);
        assert!(lost.is_some(), "{scope:?} is not found in {states} states");
    }
}
