//! Requests to a storage server.

use serde::{Deserialize, Serialize};

use crate::{
    block::BlockHash,
    inventory::BucketDigest,
    refusal::Refusal,
    types::{BootId, Epoch, ServerId},
};

/// Header of a request. Who may send what: `Put`, `Get`, `Repair`, `Has` clients and storage servers;
/// `Relay` clients; all but `Put`, `Get` and `Relay` the metadata server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StorageRequest {
    /// Payload: the bytes of all `blocks`, one after the other. At most `PUT_BATCH_MAX` blocks and
    /// `PAYLOAD_SIZE_MAX` bytes. Each block is checked against its hash, and appended if it is not there
    /// already (then its epoch is raised). All or nothing.
    Put { blocks: Vec<PutBlock>, durable: bool },
    /// A block, or the part of it that `range` needs.
    Get { block: BlockHash, range: Option<ByteRange> },
    /// Makes everything that is visible durable: one fdatasync for all who wait.
    Sync,
    /// Which of `blocks` (at most `HASH_LIST_MAX`) are here, indexed and of plausible length; does not read their bytes.
    Has { blocks: Vec<BlockHash> },
    /// "Your copy is bad": the server re-reads its copy; unless that is good, it fetches one from `sources`, verifies it, stores it
    /// durably before it answers, and keeps the bad one in quarantine. Without a good one the bad one stays.
    Repair { block: BlockHash, sources: Vec<Source> },
    /// Fetch a block that is not here from `sources`, verify it, store it durably. If it is here it is only made durable. Either way it
    /// is stamped with at least `epoch` then.
    Obtain { block: BlockHash, sources: Vec<Source>, epoch: Epoch },
    /// Deletes the blocks whose stored epoch is below `epoch`.
    Delete { blocks: Vec<BlockHash>, epoch: Epoch },
    /// Hashes that are here, in order, after `after`; at most `HASH_LIST_MAX`.
    List { after: Option<BlockHash> },
    /// What stands for the hashes that are here and begin with `bucket`.
    Digest { bucket: u8 },
    /// Read and check all that is here, now and without breaks. Answered at once.
    Scrub,
    /// Payload: the bytes at `offset` of a copy of the metadata, which is complete with `end`. `number`: of the copy, in seconds since
    /// 1970. The newest few are kept.
    KeepBackup { number: u64, offset: u64, end: bool },
    /// Payload: the bytes of `block`. A `Put` of it here, and beside that one at each of `to` (at most `PASSED_ON_MAX`), for each of whom
    /// `patience_ms` are waited at most.
    Relay { block: PutBlock, durable: bool, to: Vec<Source>, patience_ms: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutBlock {
    pub hash: BlockHash,
    /// 1..=BLOCK_SIZE_MAX.
    pub length: u32,
    /// The stored stamp becomes the larger of this and what is there.
    pub epoch: Epoch,
}

/// Bytes `offset..offset+length` of a block. `length` ≥ 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    pub offset: u32,
    pub length: u32,
}

/// A server that should have a good copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub server: ServerId,
    pub address: std::net::SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageReply(pub Result<StorageAnswer, Refusal>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StorageAnswer {
    /// Visible under `boot`; durable as well if that was asked for.
    Put {
        boot: BootId,
        durable: bool,
    },
    /// Payload: with no range the block; with a range the BLAKE3 tree slice that proves it: bao encoding
    /// with groups of `HASH_GROUP_SIZE` (bao-tree, no length prefix), from the group-aligned range.
    Get {
        block_length: u32,
    },
    Sync {
        boot: BootId,
    },
    /// One for each that was asked for, in order.
    Has {
        boot: BootId,
        present: Vec<bool>,
    },
    /// `false`: the copy was good after all (or had been repaired already).
    Repaired {
        replaced: bool,
    },
    Obtained {
        boot: BootId,
    },
    Deleted {
        count: u32,
    },
    /// Each with its stamp.
    List {
        blocks: Vec<(BlockHash, Epoch)>,
        end: bool,
    },
    Digest(BucketDigest),
    Scrubbing,
    /// A part of a copy of the metadata; with the last one all of it, durably.
    Kept,
    /// What became of the block here and, in their order, with those whom it was passed on to: under which boots it is visible, and
    /// durable if that was asked for. `Unavailable`: who has not answered; it may have the block all the same.
    Relayed {
        copies: Vec<Result<BootId, Refusal>>,
    },
}
