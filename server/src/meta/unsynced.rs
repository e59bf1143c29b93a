//! Copies that were acknowledged as visible and are not yet known to be durable. Pure.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_common::{BlockHash, BootId, ServerId, wire::meta::NewBlock};

/// Copies past which new data is refused until a barrier has run: bounds the memory of this list.
pub const UNSYNCED_MAX: usize = 1 << 20;

/// By server and the boot under which it acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unsynced {
    copies: BTreeMap<ServerId, BTreeMap<BootId, BTreeSet<BlockHash>>>,
    count: usize,
}

impl Unsynced {
    /// Takes note of the copies that a commit named.
    pub fn note(&mut self, blocks: &[NewBlock]) {
        for block in blocks {
            for holder in block.holders.iter().filter(|holder| !holder.durable) {
                self.add(holder.server, holder.boot, block.hash);
            }
        }
    }

    pub fn add(&mut self, server: ServerId, boot: BootId, hash: BlockHash) {
        if self.copies.entry(server).or_default().entry(boot).or_default().insert(hash) {
            self.count += 1;
        }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn is_full(&self) -> bool {
        self.count >= UNSYNCED_MAX
    }

    /// Server by server, what it has acknowledged under which boot.
    pub fn take(&mut self) -> BTreeMap<ServerId, BTreeMap<BootId, BTreeSet<BlockHash>>> {
        self.count = 0;
        std::mem::take(&mut self.copies)
    }

    /// Who still has to sync this block.
    pub fn servers_of(&self, hash: BlockHash) -> Vec<ServerId> {
        let has = |copies: &BTreeMap<BootId, BTreeSet<BlockHash>>| copies.values().any(|hashes| hashes.contains(&hash));
        self.copies.iter().filter(|(_, copies)| has(copies)).map(|(server, _)| *server).collect()
    }
}
