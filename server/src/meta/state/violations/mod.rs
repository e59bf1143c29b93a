//! Every invariant of the tables, as a function that tells in sentences where it is broken.
//!
//! The same list serves the tests after every step, and `holdfast fsck`. The tables need not fit into memory: each is gone through
//! once, what belongs together is looked up, and what has to be counted across all of it is compared as a sum (`tally`). Only a
//! sum that is wrong has the culprits counted, a part of them at a time (`culprits`). Held in memory are 16 bytes for each
//! directory, some kilobytes for each storage server, and what one sentence needs.

mod blocks;
mod culprits;
mod mend;
mod tally;
mod tree;

use std::{array, collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{Sequence, SessionId};

pub(super) use self::mend::correct;
pub use self::mend::{Correction, Differences};
use super::{
    Rows, session,
    tables::{Result, key, past, scan},
};

/// What is wrong, in sentences, and what is to be done about it: of each as much as is wanted.
#[derive(Debug)]
struct Found {
    sentences: Vec<String>,
    sentences_max: usize,
    /// By turn.
    corrections: [Vec<Correction>; mend::TURNS],
    /// Of each turn.
    corrections_max: usize,
    more_said_than_there: MoreSaid,
}

/// Rows that say that there is more than there is.
#[derive(Debug, Default)]
struct MoreSaid {
    /// A file, of what it stores.
    stored: bool,
    /// A block, of pieces.
    pieces: bool,
    /// A directory, of names.
    names: bool,
    /// An inode, of links.
    links: bool,
    /// A name, or a piece, of inodes.
    inodes: bool,
}

impl Found {
    fn new(sentences_max: usize, corrections_max: usize) -> Self {
        Self {
            sentences: Vec::new(),
            sentences_max,
            corrections: array::from_fn(|_| Vec::new()),
            corrections_max,
            more_said_than_there: MoreSaid::default(),
        }
    }

    /// Nothing more is wanted of what would be corrected in this turn.
    fn is_full(&self, turn: usize) -> bool {
        self.sentences.len() >= self.sentences_max && self.corrections[turn].len() >= self.corrections_max
    }

    /// What a person has to judge.
    fn push(&mut self, sentence: String) {
        if self.sentences.len() < self.sentences_max {
            self.sentences.push(sentence);
        }
    }

    fn push_mended(&mut self, sentence: String, by: Correction) {
        self.push(sentence);
        self.mend(by);
    }

    /// What another sentence is about.
    fn mend(&mut self, by: Correction) {
        let turn = &mut self.corrections[by.turn()];
        if turn.len() < self.corrections_max && turn.last() != Some(&by) {
            turn.push(by);
        }
    }

    /// What may be corrected, in the order in which it is to be made.
    ///
    /// Where two that do not know of each other say that there is more than there is, it is a row that is lost, and not a count that is
    /// wrong: neither is corrected, for that would have the rest of it deleted. And who has no name is only known when nothing else
    /// is wrong.
    fn into_makeable(self) -> Vec<Correction> {
        let said = self.more_said_than_there;
        let (pieces, names) = (said.stored && said.pieces, said.names && said.links);
        let (pieces_lost, names_lost) = (pieces || said.inodes, names || said.inodes);
        let is_safe = |correction: &Correction| match correction {
            Correction::Inode { nlink, size, stored, .. } => {
                !(pieces_lost && *stored < 0) && !(names_lost && (*nlink < 0 || *size < 0))
            }
            Correction::References { refs, by_replicas, .. } => {
                !(pieces_lost && (*refs < 0 || by_replicas.iter().any(|by| *by < 0)))
            }
            Correction::Counters(by) => !(said.inodes && by.inodes < 0),
            _ => true,
        };
        let [turns @ .., last] = self.corrections;
        let first: Vec<Correction> = turns.into_iter().flatten().filter(is_safe).collect();
        if first.is_empty() && !pieces_lost && !names_lost { last } else { first }
    }
}

/// At most `count` sentences; none: all is well.
pub fn violations(rows: &impl Rows, count: usize) -> Result<Vec<String>> {
    Ok(look(rows, Found::new(count, 0))?.sentences)
}

/// At most `count` corrections of each kind, to be made before others are looked for; none: what is still wrong is for a person to judge.
pub fn corrections(rows: &impl Rows, count: usize) -> Result<Vec<Correction>> {
    Ok(look(rows, Found::new(0, count))?.into_makeable())
}

fn look(rows: &impl Rows, mut found: Found) -> Result<Found> {
    let of_tree = tree::check(rows, &mut found)?;
    let of_blocks = blocks::check(rows, &mut found)?;
    if of_tree.names != of_tree.links {
        culprits::links(rows, of_tree.inodes, &mut found)?;
    }
    if of_tree.references != of_blocks.references {
        culprits::references(rows, of_blocks.blocks, &mut found)?;
    }
    counters_are_true(rows, &of_tree, &of_blocks, &mut found);
    replies_belong_to_sessions(rows, &mut found)?;
    Ok(found)
}

fn counters_are_true(rows: &impl Rows, tree: &tree::Seen, blocks: &blocks::Seen, found: &mut Found) {
    let counters = rows.counters();
    let counted = (counters.inodes, counters.blocks_by_copies, counters.owed, counters.unnamed, counters.condemned);
    let true_ones = (tree.inodes, blocks.by_copies, blocks.owed, blocks.unnamed, blocks.condemned);
    if counted == true_ones {
        return;
    }
    let less = |counted: u64, is: u64| is.wrapping_sub(counted).cast_signed();
    let by = Differences {
        inodes: less(counters.inodes, tree.inodes),
        blocks_by_copies: array::from_fn(|copies| less(counters.blocks_by_copies[copies], blocks.by_copies[copies])),
        owed: less(counters.owed, blocks.owed),
        unnamed: less(counters.unnamed, blocks.unnamed),
        condemned: less(counters.condemned, blocks.condemned),
    };
    let said = &mut found.more_said_than_there;
    said.inodes |= by.inodes < 0 && (said.pieces || said.links);
    found.push_mended(
        format!("inodes, blocks by copies, owed, unnamed, condemned are counted as {counted:?}, and are {true_ones:?}"),
        Correction::Counters(by),
    );
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
        let (id, sequence) = reply_of(key);
        match sessions.get(&id) {
            Some(row) if sequence >= row.answered_below => {}
            _ => found.push_mended(
                format!("reply {sequence} is kept for session {id}, which has no use for it"),
                Correction::Reply { key: key.to_vec() },
            ),
        }
        Ok(ControlFlow::Continue(()))
    })
}

fn reply_of(key: &[u8]) -> (SessionId, Sequence) {
    let word = |at: usize| key.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_be_bytes);
    (SessionId(word(1)), Sequence(word(9)))
}

/// Whether somebody may ask for the reply under this key.
fn is_wanted_reply(rows: &impl Rows, key: &[u8]) -> Result<bool> {
    let (id, sequence) = reply_of(key);
    Ok(session::session(rows, id)?.is_some_and(|row| sequence >= row.answered_below))
}
