//! The metadata state machine: what an entry of the log does to the tables.
//!
//! Invariants of absence: nothing here reads a clock, draws a number, touches the environment or the order of a
//! hash map (I6). Time comes in the entry, numbers are counted in the tables. The same entries make the same
//! bytes, on every replica and at every replay.

pub mod acl;
pub mod blocks;
pub mod file;
pub mod garbage;
pub mod holdings;
pub mod namespace;
pub mod orphans;
pub mod query;
pub mod recovery;
pub mod replicas;
pub mod rows;
pub mod servers;
pub mod session;
pub mod tables;
pub mod tokens;
pub mod violations;
pub mod xattr;

#[cfg(test)]
pub(crate) mod tests;

use holdfast_common::{
    BlockHash, Epoch, Ino, Position, Refusal, Replicas, Sequence, ServerId, SessionId, Time,
    cluster::Standing,
    net::identity::{NodeName, Role},
    wire::meta::{CopyFault, Mutated, NewBlock, Op},
};
use serde::{Deserialize, Serialize};

use namespace::Number;
use rows::Inode;
pub use tables::{Newest, Rows, StorageError, Tables, View};
use violations::Correction;

/// One step of the state machine, as the log keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When it was proposed, by the proposing server's clock. Never before the entry before it.
    pub time: Time,
    pub command: Command,
}

/// What can be done to the tables. New ones go to the end: the number is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    Mutate {
        session: SessionId,
        sequence: Sequence,
        answered_below: Sequence,
        op: Op,
    },
    OpenSession {
        node: NodeName,
        instance: [u8; 16],
        host: String,
        mountpoint: String,
    },
    EndSession {
        session: SessionId,
    },
    /// Deletes what is left of inodes that have no name and that nobody has open.
    Reclaim {
        inos: Vec<Ino>,
    },
    RegisterServer {
        server: ServerId,
        address: std::net::SocketAddr,
        zone: String,
    },
    /// Copies that the system made, stamped with at least `epoch`.
    HolderAdded {
        server: ServerId,
        blocks: Vec<BlockHash>,
        epoch: Epoch,
    },
    /// Copies that turned out not to be there. The last holder of a block stays on record, unless the block is condemned.
    HolderLost {
        server: ServerId,
        blocks: Vec<BlockHash>,
    },
    BadCopy {
        server: ServerId,
        block: BlockHash,
        fault: CopyFault,
        repaired: bool,
    },
    IssueToken {
        secret_hash: [u8; 32],
        role: Role,
        expires: Time,
    },
    UseToken {
        secret_hash: [u8; 32],
        csr_hash: [u8; 32],
    },
    /// The server has come back without what was not durable: mounts say again what they had done since.
    BeginRecovery,
    /// A change of the time before, made again.
    Replay {
        session: SessionId,
        sequence: Sequence,
        op: Op,
        made: Option<Ino>,
        /// When it was made first.
        time: Option<Time>,
    },
    /// Nobody is waited for any more.
    EndRecovery,
    /// A mount has said all that it had done.
    Settled {
        session: SessionId,
    },
    /// As versions before wrote [`Self::CondemnUnnamed`], in a log that one of them has left. All that no piece names is condemned then,
    /// also what had been named again since the time: stop a server in good order, which empties its log, before a new version runs.
    Condemn {
        blocks: Vec<BlockHash>,
        unnamed_before: Time,
    },
    /// The same, of copies that a server has of blocks that are not known; and of other blocks that it is not on record for: what it
    /// has of those counts no more, so that it can be deleted there.
    CondemnStrays {
        server: ServerId,
        blocks: Vec<BlockHash>,
    },
    /// Blocks that were condemned at `epoch`, and of which no copy with an earlier stamp is left.
    Forget {
        blocks: Vec<BlockHash>,
        epoch: Epoch,
    },
    /// What the operator wants of a storage server.
    Stand {
        server: ServerId,
        standing: Standing,
    },
    /// Takes a server off the record of those blocks that are on record for enough of the servers that count, and condemns its copies.
    Retire {
        server: ServerId,
        blocks: Vec<BlockHash>,
        counting: Vec<ServerId>,
    },
    /// A server has deleted its copies of what was condemned at `epoch`.
    Deleted {
        server: ServerId,
        blocks: Vec<BlockHash>,
        epoch: Epoch,
    },
    /// So many copies from now on of all that has no number of its own.
    SetReplicas {
        replicas: Replicas,
    },
    /// The rows of the next blocks follow that.
    Retarget,
    /// Chunks of files whose number of copies has changed follow it.
    Recount {
        inos: Vec<Ino>,
    },
    /// Blocks that no piece has named after that are to be deleted: from here on no commit may count on their copies.
    CondemnUnnamed {
        blocks: Vec<BlockHash>,
        unnamed_through: Position,
    },
    /// Copies of a server that is gone for good, also the last ones of their blocks: what these are in is lost.
    GiveUp {
        server: ServerId,
        blocks: Vec<BlockHash>,
    },
    /// What follows from other rows, and was found wrong in a view of `seen`.
    Correct {
        seen: Position,
        corrections: Vec<Correction>,
    },
}

impl Command {
    /// The blocks that it brings, with who has them.
    pub fn new_blocks(&self) -> &[NewBlock] {
        match self {
            Self::Mutate { op, .. } | Self::Replay { op, .. } => op.new_blocks(),
            _ => &[],
        }
    }

    /// The directories whose entries it changes for a mount that waits for their attributes.
    pub fn directories(&self) -> Vec<Ino> {
        match self {
            Self::Mutate { op, .. } => op.directories(),
            _ => Vec::new(),
        }
    }
}

/// An answer that every replica computes alike.
pub type Outcome = Result<Reply, Refusal>;

#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every answer is the large one: a box would be one more allocation"
)]
pub enum Reply {
    Mutated(Mutated),
    Session(SessionId),
    /// `unfinished`: some rows are left; propose the same again.
    Reclaimed {
        unfinished: bool,
    },
    Enrolled {
        role: Role,
        id: u32,
    },
    /// How many blocks lost that holder.
    Lost(usize),
    /// `None`: there was nothing to condemn any more.
    Condemned(Option<Epoch>),
    /// Whose copies on that server may be deleted at that epoch.
    Strays {
        epoch: Epoch,
        condemned: Vec<BlockHash>,
    },
    /// How many of them there was something to be done about.
    Corrected {
        made: u64,
    },
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Of the entry, or, for a mutation that was answered before, of the first one.
    pub position: Position,
    /// False: the tables are as they were, and the entry has no place in the log.
    pub changed: bool,
    pub outcome: Outcome,
}

/// Why an operation went no further.
#[derive(Debug)]
pub enum Stop {
    Refused(Refusal),
    Fault(StorageError),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<E: Into<StorageError>> From<E> for Stop {
    fn from(fault: E) -> Self {
        Self::Fault(fault.into())
    }
}

/// A step of an operation. Every refusal comes before the first change.
pub type Step<T> = Result<T, Stop>;

/// Parts an answer from a fault.
pub(crate) fn settled<T>(step: Step<T>) -> Result<Result<T, Refusal>, StorageError> {
    match step {
        Ok(value) => Ok(Ok(value)),
        Err(Stop::Refused(refusal)) => Ok(Err(refusal)),
        Err(Stop::Fault(fault)) => Err(fault),
    }
}

/// Makes the root directory, if there is none yet.
pub fn initialize(tables: &mut Tables<'_>) -> Result<(), StorageError> {
    if tables.inode(Ino::ROOT)?.is_none() {
        tables.put_inode(Ino::ROOT, namespace::root(Time::default()));
        tables.counters.inodes += 1;
    }
    holdings::adopt(tables)
}

/// Does what `entry` says. A refusal is an answer, and leaves the tree as it was.
pub fn apply(tables: &mut Tables<'_>, entry: &Entry) -> Result<Applied, StorageError> {
    let outcome = match &entry.command {
        Command::Mutate { session, sequence, answered_below, op } => {
            return session::once(tables, *session, *sequence, *answered_below, |tables| {
                mutate(tables, op, &Number::Next, entry.time)
            });
        }
        Command::Replay { session, sequence, op, made, time } => {
            let now = time.unwrap_or(entry.time);
            return session::again(tables, *session, *sequence, |tables, owed| match op {
                // Its place was decided the first time, and has been seen.
                Op::Append { file, blocks, .. } => file::commit(tables, std::slice::from_ref(file), blocks, now),
                op => mutate(tables, op, &Number::Before { made: *made, lost: owed.numbers() }, now),
            });
        }
        Command::Correct { seen, corrections } => Ok(violations::correct(tables, *seen, corrections)?),
        Command::BeginRecovery => Ok(recovery::begin(tables)?),
        Command::EndRecovery => Ok(recovery::end(tables)?),
        Command::Settled { session } => Ok(recovery::settle(tables, *session)?),
        Command::OpenSession { node, instance, host, mountpoint } => {
            settled(session::open(tables, *node, instance, host, mountpoint))?
        }
        Command::EndSession { session } => settled(session::end(tables, *session))?,
        Command::Reclaim { inos } => Ok(orphans::reclaim(tables, inos)?),
        Command::RegisterServer { server, address, zone } => {
            settled(servers::register(tables, *server, *address, zone))?
        }
        Command::Stand { server, standing } => settled(servers::stand(tables, *server, *standing))?,
        Command::HolderAdded { server, blocks, epoch } => Ok(servers::holder_added(tables, *server, blocks, *epoch)?),
        Command::HolderLost { server, blocks } => Ok(servers::holder_lost(tables, *server, blocks)?),
        Command::GiveUp { server, blocks } => Ok(servers::give_up(tables, *server, blocks)?),
        Command::BadCopy { server, block, fault, repaired } => {
            Ok(servers::bad_copy(tables, *server, *block, *fault, *repaired)?)
        }
        Command::Condemn { blocks, unnamed_before: _ } => Ok(garbage::condemn(tables, blocks, Position(u64::MAX))?),
        Command::CondemnStrays { server, blocks } => Ok(garbage::condemn_strays(tables, *server, blocks)?),
        Command::Retire { server, blocks, counting } => Ok(garbage::retire(tables, *server, blocks, counting)?),
        Command::Deleted { server, blocks, epoch } => Ok(garbage::deleted(tables, *server, blocks, *epoch)?),
        Command::SetReplicas { replicas } => Ok(replicas::set_default(tables, *replicas)?),
        Command::Retarget => Ok(replicas::retarget(tables)?),
        Command::Recount { inos } => Ok(replicas::recount(tables, inos)?),
        Command::CondemnUnnamed { blocks, unnamed_through } => Ok(garbage::condemn(tables, blocks, *unnamed_through)?),
        Command::Forget { blocks, epoch } => Ok(garbage::forget(tables, blocks, *epoch)?),
        Command::IssueToken { secret_hash, role, expires } => {
            settled(tokens::issue(tables, secret_hash, *role, *expires, entry.time))?
        }
        Command::UseToken { secret_hash, csr_hash } => {
            settled(tokens::redeem(tables, secret_hash, csr_hash, entry.time))?
        }
    };
    Ok(Applied { position: advance(tables), changed: true, outcome })
}

/// The place of the entry that is being applied.
pub(super) fn advance(tables: &mut Tables<'_>) -> Position {
    tables.counters.position.0 += 1;
    tables.counters.position
}

fn mutate(tables: &mut Tables<'_>, op: &Op, number: &Number, now: Time) -> Step<Mutated> {
    match op {
        Op::Make { parent, name, new, exclusive, open: _ } => {
            namespace::make(tables, (*parent, name), new, *exclusive, number, now)
        }
        Op::Place { parent, name, new, ino, time } | Op::PlaceOpen { parent, name, new, ino, time } => {
            namespace::make(tables, (*parent, name), new, true, &Number::Chosen(*ino), now.min(*time))
        }
        Op::MakeUnnamed { parent, new, linkable } => {
            namespace::make_unnamed(tables, *parent, new, *linkable, number, now)
        }
        Op::Link { ino, parent, name } => namespace::link(tables, *ino, *parent, name, now),
        Op::Unlink { parent, name } => namespace::unlink(tables, *parent, name, now),
        Op::Rmdir { parent, name } => namespace::rmdir(tables, *parent, name, now),
        Op::Remove { parent, name, ino, time } => {
            namespace::remove_inode(tables, (*parent, name), *ino, now.min(*time))
        }
        Op::Rename { from, from_name, to, to_name, mode } => {
            namespace::rename(tables, (*from, from_name), (*to, to_name), *mode, now)
        }
        Op::SetAttr { ino, set } => file::set_attr(tables, *ino, set, now),
        Op::SetXattr { ino, name, value, mode } => xattr::set(tables, *ino, name, value, *mode, now),
        Op::RemoveXattr { ino, name } => xattr::remove(tables, *ino, name, now),
        Op::Commit { files, blocks } => file::commit(tables, files, blocks, now),
        Op::CopyRange { from, from_offset, to, to_offset, length } => {
            file::copy_range(tables, (*from, *from_offset), (*to, *to_offset), *length, now)
        }
        Op::Append { file, blocks, at_size } => file::append(tables, file, blocks, *at_size, now),
        Op::Accessed { files, always } => file::accessed(tables, files, *always),
        Op::Punch { ino, offset, length, grow } => file::punch(tables, *ino, *offset, *length, *grow, now),
    }
}

/// The inode, which may have lost its last name; `Stale` if it is gone.
pub(crate) fn existing(rows: &impl Rows, ino: Ino) -> Step<Inode> {
    Ok(rows.inode(ino)?.ok_or(Refusal::Stale)?)
}
