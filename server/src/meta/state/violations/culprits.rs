//! Which inode or block it is that a wrong sum is wrong about. A part of them at a time, each in a pass of its own.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{BlockHash, Ino, limits::REPLICAS_MAX};

use super::{Correction, Found, mend};
use crate::meta::state::{
    Rows, StorageError, blocks,
    rows::{BlockRow, Dentry, Inode, decode_chunk},
    tables::{Result, key, past, scan},
};

/// Inodes or blocks that are counted in memory at a time.
const PART: u64 = 1 << 19;

/// Inodes that count other links than they have names.
pub(super) fn links(rows: &impl Rows, inodes: u64, found: &mut Found) -> Result<()> {
    let parts = inodes / PART + 1;
    for part in 0..parts {
        if found.is_full(mend::COUNTS) {
            // Nothing is known of the rest.
            found.more_said_than_there.links = true;
            break;
        }
        let mut names: BTreeMap<Ino, u32> = BTreeMap::new();
        scan_tree(rows, key::DENTRY, |_, row| {
            let ino = Dentry::decode(row)?.ino;
            if ino.0 % parts == part {
                *names.entry(ino).or_default() += 1;
            }
            Ok(())
        })?;
        scan_tree(rows, key::INODE, |ino, row| {
            if ino.0 % parts == part {
                let inode = Inode::decode(row)?;
                let counted = if inode.is_directory() { inode.nlink.min(1) } else { inode.nlink };
                let names = names.get(&ino).copied().unwrap_or(0) + u32::from(ino == Ino::ROOT);
                if counted != names {
                    found.push(format!("inode {ino} counts {} links, and has {names} names", inode.nlink));
                    found.more_said_than_there.links |= counted > names;
                    // One without a name is not taken for one that nobody wants. What a directory counts depends on more.
                    if names > 0 && !inode.is_directory() {
                        let nlink = i64::from(names.wrapping_sub(inode.nlink).cast_signed());
                        found.mend(Correction::Inode { ino, nlink, size: 0, stored: 0 });
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The rows of all inodes that have this tag.
fn scan_tree(rows: &impl Rows, tag: u8, mut visit: impl FnMut(Ino, &[u8]) -> Result<()>) -> Result<()> {
    let damaged = || StorageError::Damaged("tree: key".into());
    scan(rows.tree(), &[], &past(&[]), |key, row| {
        let (ino, rest) = key.split_first_chunk::<8>().ok_or_else(damaged)?;
        if rest.first() == Some(&tag) {
            visit(Ino(u64::from_be_bytes(*ino)), row)?;
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Blocks that count other pieces than name them.
pub(super) fn references(rows: &impl Rows, blocks: u64, found: &mut Found) -> Result<()> {
    let parts = blocks / PART + 1;
    let is_of = |part: u64, hash: &BlockHash| {
        let word = hash.0.first_chunk::<8>().map_or(0, |word| u64::from_be_bytes(*word));
        word % parts == part
    };
    for part in 0..parts {
        if found.is_full(mend::COUNTS) {
            found.more_said_than_there.pieces = true;
            break;
        }
        let mut named: BTreeMap<BlockHash, (u64, [u64; REPLICAS_MAX])> = BTreeMap::new();
        scan_tree(rows, key::PIECES, |_, row| {
            let (pieces, replicas) = decode_chunk(row)?;
            for piece in pieces.iter().filter(|piece| is_of(part, &piece.block)) {
                let (all, by_replicas) = named.entry(piece.block).or_default();
                *all += 1;
                replicas.own().into_iter().for_each(|own| by_replicas[own - 1] += 1);
            }
            Ok(())
        })?;
        scan_blocks(rows, |hash, row| {
            if is_of(part, &hash) {
                let (all, by_replicas) = named.get(&hash).copied().unwrap_or_default();
                compare(hash, &row, all, by_replicas, found);
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn compare(hash: BlockHash, row: &BlockRow, all: u64, by_replicas: [u64; REPLICAS_MAX], found: &mut Found) {
    if (row.refs, row.refs_by_replicas) == (all, by_replicas) {
        return;
    }
    let counts = row.refs_by_replicas.iter().zip(by_replicas);
    found.more_said_than_there.pieces |= row.refs > all || counts.into_iter().any(|(counted, is)| *counted > is);
    // Its copies may be gone.
    if !row.condemned {
        let less = |counted: u64, is: u64| is.wrapping_sub(counted).cast_signed();
        found.mend(Correction::References {
            block: hash,
            epoch: row.epoch,
            refs: less(row.refs, all),
            by_replicas: std::array::from_fn(|own| less(row.refs_by_replicas[own], by_replicas[own])),
        });
    }
    if row.refs != all {
        found.push(format!("block {hash} counts {} pieces, and {all} name it", row.refs));
    }
    if row.refs_by_replicas != by_replicas {
        let counted = row.refs_by_replicas;
        found.push(format!("block {hash} counts {counted:?} pieces by copies wanted, and {by_replicas:?} name it"));
    }
}

fn scan_blocks(rows: &impl Rows, mut visit: impl FnMut(BlockHash, BlockRow) -> Result<()>) -> Result<()> {
    scan(rows.blocks(), &[key::BLOCK], &past(&[key::BLOCK]), |key, row| {
        visit(blocks::hash_of(key)?, BlockRow::decode(row)?).map(ControlFlow::Continue)
    })
}
