//! Every invariant of the tables, as a function that tells in sentences where it is broken.
//!
//! The same list serves the tests after every step, and `holdfast fsck`. The tables need not fit into memory: each is gone through
//! once, what belongs together is looked up, and what has to be counted across all of it is compared as a sum (`tally`). Only a
//! sum that is wrong has the culprits counted, a part of them at a time (`culprits`). Held in memory are 16 bytes for each
//! directory, and what one sentence needs.

mod blocks;
mod culprits;
mod tally;
mod tree;

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::SessionId;

use super::{
    Rows, session,
    tables::{Result, key, past, scan},
};

/// Sentences, up to as many as are wanted.
#[derive(Debug)]
struct Found {
    sentences: Vec<String>,
    count: usize,
}

impl Found {
    fn is_full(&self) -> bool {
        self.sentences.len() >= self.count
    }

    fn push(&mut self, sentence: String) {
        if self.sentences.len() < self.count {
            self.sentences.push(sentence);
        }
    }
}

/// At most `count` sentences; none: all is well.
pub fn violations(rows: &impl Rows, count: usize) -> Result<Vec<String>> {
    let mut found = Found { sentences: Vec::new(), count };
    let of_tree = tree::check(rows, &mut found)?;
    let of_blocks = blocks::check(rows, &mut found)?;
    if of_tree.names != of_tree.links {
        culprits::links(rows, of_tree.inodes, &mut found)?;
    }
    if of_tree.references != of_blocks.references {
        culprits::references(rows, of_blocks.blocks, &mut found)?;
    }
    if of_blocks.held != of_blocks.holders {
        culprits::holders(rows, &mut found)?;
    }
    counters_are_true(rows, &of_tree, &of_blocks, &mut found);
    replies_belong_to_sessions(rows, &mut found)?;
    Ok(found.sentences)
}

fn counters_are_true(rows: &impl Rows, tree: &tree::Seen, blocks: &blocks::Seen, found: &mut Found) {
    let counters = rows.counters();
    let counted = (counters.inodes, counters.blocks_by_copies, counters.owed, counters.unnamed, counters.condemned);
    let true_ones = (tree.inodes, blocks.by_copies, blocks.owed, blocks.unnamed, blocks.condemned);
    if counted != true_ones {
        found.push(format!(
            "inodes, blocks by copies, owed, unnamed, condemned are counted as {counted:?}, and are {true_ones:?}"
        ));
    }
}

fn replies_belong_to_sessions(rows: &impl Rows, found: &mut Found) -> Result<()> {
    let sessions: BTreeMap<SessionId, _> = session::sessions(rows)?.into_iter().collect();
    let mut instances = 0;
    scan(rows.state(), &[key::INSTANCE], &past(&[key::INSTANCE]), |_, _| {
        instances += 1;
        Ok(ControlFlow::Continue(()))
    })?;
    if instances != sessions.len() {
        found.push(format!("there are {instances} instances for {} sessions", sessions.len()));
    }
    scan(rows.state(), &[key::REPLY], &past(&[key::REPLY]), |key, _| {
        let word = |at: usize| key.get(at..at + 8).and_then(|word| word.try_into().ok()).map(u64::from_be_bytes);
        let (id, sequence) = (SessionId(word(1).unwrap_or(0)), word(9).unwrap_or(0));
        match sessions.get(&id) {
            Some(row) if sequence >= row.answered_below.0 => {}
            _ => found.push(format!("reply {sequence} is kept for session {id}, which has no use for it")),
        }
        Ok(ControlFlow::Continue(()))
    })
}
