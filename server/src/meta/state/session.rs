//! Sessions, and the replies kept for each so that a retry gets the first answer (I5).

use std::ops::ControlFlow;

use holdfast_common::planted::{Bug, is_planted};
use holdfast_common::{
    Position, Refusal, Sequence, SessionId,
    limits::REPLIES_KEPT_PER_SESSION,
    net::identity::NodeName,
    wire::{codec, meta::Mutated},
};

use super::{
    Applied, Reply, Rows, Step, StorageError, Tables, advance,
    recovery::{self, Owed},
    rows::SessionRow,
    settled,
    tables::{Result, fetch, key, past, scan},
};

/// Bytes of the host name and of the mount point that a session may tell.
const HOST_LENGTH_MAX: usize = 255;
const MOUNTPOINT_LENGTH_MAX: usize = 4096;

/// A mutation's answer as it is kept: its position and what it did.
type Kept = (Position, Result<Mutated, Refusal>);

/// Opens a session for a mount's `instance`, or finds the one it opened before.
pub(super) fn open(
    tables: &mut Tables<'_>,
    node: NodeName,
    instance: &[u8; 16],
    host: &str,
    mountpoint: &str,
) -> Step<Reply> {
    if host.len() > HOST_LENGTH_MAX || mountpoint.len() > MOUNTPOINT_LENGTH_MAX {
        return Err(Refusal::NameTooLong.into());
    }
    let index = key::instance(node, instance);
    if let Some(known) = fetch(tables.state(), &index, decode_id)? {
        return Ok(Reply::Session(known));
    }
    let id = SessionId(tables.counters.session_next);
    tables.counters.session_next += 1;
    let row = SessionRow {
        node,
        instance: *instance,
        host: host.to_owned(),
        mountpoint: mountpoint.to_owned(),
        answered_below: Sequence(1),
    };
    tables.put_state(&key::session(id), &row.encode())?;
    tables.put_state(&index, &id.0.to_le_bytes())?;
    Ok(Reply::Session(id))
}

/// Forgets a session and its kept replies. Done already: fine.
pub(super) fn end(tables: &mut Tables<'_>, id: SessionId) -> Step<Reply> {
    let Some(row) = session(tables, id)? else { return Ok(Reply::Done) };
    let prefix = key::replies(id);
    drop_replies(tables, &prefix, &past(&prefix))?;
    tables.watermarks.remove(&id);
    recovery::settle(tables, id)?;
    tables.remove_state(&key::instance(row.node, &row.instance))?;
    tables.remove_state(&key::session(id))?;
    Ok(Reply::Done)
}

/// Applies a mutation once: asked again, it gives the answer of the first time.
pub(super) fn once(
    tables: &mut Tables<'_>,
    id: SessionId,
    sequence: Sequence,
    answered_below: Sequence,
    operation: impl FnOnce(&mut Tables<'_>) -> Step<Mutated>,
) -> Result<Applied> {
    let first = match admit(tables, id, sequence, answered_below)? {
        Admission::New { first } => first,
        Admission::Answered(kept) => {
            let (position, outcome) = *kept;
            return Ok(Applied { position, changed: false, outcome: outcome.map(Reply::Mutated) });
        }
        Admission::Refused(refusal) => {
            return Ok(Applied { position: tables.counters.position, changed: false, outcome: Err(refusal) });
        }
    };
    if answered_below > first {
        drop_replies(tables, &key::reply(id, first), &key::reply(id, answered_below))?;
        tables.watermarks.insert(id, answered_below);
    }
    perform(tables, id, sequence, operation)
}

/// Applies a mutation that had been answered and was lost, once, if the session owes such. It has gone on since, so the sequence may
/// be anywhere.
pub(super) fn again(
    tables: &mut Tables<'_>,
    id: SessionId,
    sequence: Sequence,
    operation: impl FnOnce(&mut Tables<'_>, &Owed) -> Step<Mutated>,
) -> Result<Applied> {
    let position = tables.counters.position;
    if watermark(tables, id)?.is_none() {
        return Ok(Applied { position, changed: false, outcome: Err(Refusal::SessionExpired) });
    }
    let Some(owed) = recovery::owed_by(tables, id)? else {
        return Ok(Applied { position, changed: false, outcome: Err(Refusal::Invalid) });
    };
    if let Some((position, outcome)) = fetch(tables.state(), &key::reply(id, sequence), decode_kept)? {
        return Ok(Applied { position, changed: false, outcome: outcome.map(Reply::Mutated) });
    }
    perform(tables, id, sequence, |tables| operation(tables, &owed))
}

/// Does it, and keeps the answer.
fn perform(
    tables: &mut Tables<'_>,
    id: SessionId,
    sequence: Sequence,
    operation: impl FnOnce(&mut Tables<'_>) -> Step<Mutated>,
) -> Result<Applied> {
    let outcome = settled(operation(tables))?;
    let position = advance(tables);
    let kept: Kept = (position, outcome);
    let bytes = codec::encode(&kept).map_err(|e| StorageError::Damaged(format!("a reply does not encode: {e}")))?;
    if !is_planted(Bug::AnswerForgotten) {
        tables.put_state(&key::reply(id, sequence), &bytes)?;
    }
    Ok(Applied { position, changed: true, outcome: kept.1.map(Reply::Mutated) })
}

enum Admission {
    New { first: Sequence },
    Answered(Box<Kept>),
    Refused(Refusal),
}

fn admit(tables: &Tables<'_>, id: SessionId, sequence: Sequence, answered_below: Sequence) -> Result<Admission> {
    let Some(first) = watermark(tables, id)? else { return Ok(Admission::Refused(Refusal::SessionExpired)) };
    if let Some(kept) = fetch(tables.state(), &key::reply(id, sequence), decode_kept)? {
        return Ok(Admission::Answered(Box::new(kept)));
    }
    let window = first.max(answered_below).0.saturating_add(REPLIES_KEPT_PER_SESSION);
    if sequence < first || answered_below > sequence || sequence.0 >= window {
        return Ok(Admission::Refused(Refusal::BadRequest));
    }
    Ok(Admission::New { first })
}

fn watermark(tables: &Tables<'_>, id: SessionId) -> Result<Option<Sequence>> {
    match tables.watermarks.get(&id) {
        Some(first) => Ok(Some(*first)),
        None => Ok(session(tables, id)?.map(|row| row.answered_below)),
    }
}

/// Writes a watermark that a batch moved into its session's row.
pub(super) fn store_watermark(tables: &mut Tables<'_>, id: SessionId, first: Sequence) -> Result<()> {
    match session(tables, id)? {
        Some(row) => tables.put_state(&key::session(id), &SessionRow { answered_below: first, ..row }.encode()),
        None => Ok(()),
    }
}

fn drop_replies(tables: &mut Tables<'_>, start: &[u8], end: &[u8]) -> Result<()> {
    let mut answered = Vec::new();
    scan(tables.state(), start, end, |key, _| {
        answered.push(key.to_vec());
        Ok(ControlFlow::Continue(()))
    })?;
    answered.iter().try_for_each(|key| tables.remove_state(key))
}

/// The session's row, if it has not ended.
pub fn session(rows: &impl Rows, id: SessionId) -> Result<Option<SessionRow>> {
    fetch(rows.state(), &key::session(id), SessionRow::decode)
}

/// Every session, by id.
pub fn sessions(rows: &impl Rows) -> Result<Vec<(SessionId, SessionRow)>> {
    let prefix = [key::SESSION];
    let mut all = Vec::new();
    scan(rows.state(), &prefix, &past(&prefix), |key, row| {
        let id = key[1..].try_into().map_err(|_| StorageError::Damaged("session: key".into()))?;
        all.push((SessionId(u64::from_be_bytes(id)), SessionRow::decode(row)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(all)
}

fn decode_id(bytes: &[u8]) -> Result<SessionId> {
    let id = bytes.try_into().map_err(|_| StorageError::Damaged("instance: session".into()))?;
    Ok(SessionId(u64::from_le_bytes(id)))
}

fn decode_kept(bytes: &[u8]) -> Result<Kept> {
    codec::decode(bytes).map_err(|e| StorageError::Damaged(format!("kept reply: {e}")))
}
