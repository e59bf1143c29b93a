//! Which inode or block it is that a wrong sum is wrong about. A part of them at a time, each in a pass of its own.

use std::{collections::BTreeMap, ops::ControlFlow};

use holdfast_common::{BlockHash, Ino, ServerId, limits::REPLICAS_MAX};

use super::Found;
use crate::meta::state::{
    Rows, StorageError, blocks,
    rows::{BlockRow, Dentry, Inode, decode_chunk},
    tables::{Result, fetch, key, past, scan},
};

/// Inodes or blocks that are counted in memory at a time.
const PART: u64 = 1 << 19;

/// Inodes that count other links than they have names.
pub(super) fn links(rows: &impl Rows, inodes: u64, found: &mut Found) -> Result<()> {
    let parts = inodes / PART + 1;
    for part in 0..parts {
        if found.is_full() {
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
        if found.is_full() {
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

/// Blocks of which the index of holders says something else.
pub(super) fn holders(rows: &impl Rows, found: &mut Found) -> Result<()> {
    let disagree =
        |hash: BlockHash, holder: ServerId| format!("block {hash} and the index disagree about holder {holder}");
    scan_blocks(rows, |hash, row| {
        for holder in row.holders {
            if fetch(rows.blocks(), &key::held(holder, hash), |_| Ok(()))?.is_none() {
                found.push(disagree(hash, holder));
            }
        }
        Ok(())
    })?;
    scan(rows.blocks(), &[key::HELD], &past(&[key::HELD]), |key, _| {
        let server = key[1..].first_chunk::<4>().ok_or_else(|| StorageError::Damaged("blocks: key".into()))?;
        let (holder, hash) = (ServerId(u32::from_be_bytes(*server)), blocks::hash_of(key)?);
        if !blocks::block(rows, hash)?.is_some_and(|row| row.holders.contains(&holder)) {
            found.push(disagree(hash, holder));
        }
        Ok(ControlFlow::Continue(()))
    })
}
