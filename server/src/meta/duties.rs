//! What a metadata server does unasked: judges servers and sessions by their silence, and reclaims orphans.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_common::{
    Ino, ServerId,
    cluster::{ServerState, Standing},
    wire::meta::Severity,
    work,
};

use super::{
    committer::Proposer,
    core::{Core, Fault},
    journal::Note,
    state::{Command, Reply, orphans},
};

/// Where something is that happened to this server itself.
pub const METADATA_SERVER: &str = "metadata server";
const TICK: Duration = Duration::from_millis(200);
const SPACE_INTERVAL: Duration = Duration::from_millis(500);
/// Orphans that one entry reclaims.
const RECLAIM_BATCH: usize = 256;

/// Judges silence and reclaims what it leaves behind.
pub async fn watch(core: Arc<Core>, proposer: Proposer, session_timeout: Duration) -> Result<(), Fault> {
    // Apart, because what waits for the committer must not look like a time in which nobody could be heard.
    let judging = async {
        loop {
            tokio::time::sleep(TICK).await;
            judge_servers(&core);
        }
    };
    let reclaiming = async {
        loop {
            tokio::time::sleep(TICK).await;
            expire_sessions(&core, &proposer, session_timeout).await;
            end_maintenance(&core, &proposer).await;
            reclaim_orphans(&core, &proposer).await?;
        }
    };
    tokio::select! {
        never = judging => never,
        fault = reclaiming => fault,
    }
}

/// Notices when the metadata's own disk has no room left for growth, before writes to it fail.
pub async fn watch_space(core: Arc<Core>, reserve_bytes: u64) -> Result<(), Fault> {
    loop {
        let looking = Arc::clone(&core);
        let space = work::run(move || {
            let space = looking.disk.space(&looking.directory)?;
            looking.ballast.keep(space.free);
            looking.disk.space(&looking.directory)
        });
        match space.await.map_err(|_| Fault::Thread)? {
            Ok(space) => note_space(&core, space.free.saturating_add(core.ballast.held()), reserve_bytes),
            Err(error) => tracing::warn!(%error, "the space on the metadata's disk is not known"),
        }
        tokio::select! {
            () = core.space_wanted.notified() => {}
            () = tokio::time::sleep(SPACE_INTERVAL) => {}
        }
    }
}

fn note_space(core: &Core, free_bytes: u64, reserve_bytes: u64) {
    let full = free_bytes < reserve_bytes;
    match (core.full.swap(full, Ordering::Relaxed), full) {
        (false, true) => {
            tracing::error!(free_bytes, reserve_bytes, directory = %core.directory.display(), "the metadata's disk is full: what needs more of it is refused; delete something and restart this server, or make room there");
            let what = format!("its disk is full: {free_bytes} bytes are left, {reserve_bytes} have to be");
            let note = Note::new(Severity::Error, METADATA_SERVER, what);
            core.tell(
                note.meaning("nothing can be made or written").doing("what needs room is refused until there is some"),
            );
        }
        (true, false) => {
            tracing::info!(free_bytes, "there is room again on the metadata's disk");
            core.tell(Note::new(Severity::Info, METADATA_SERVER, "there is room again on its disk"));
        }
        _ => {}
    }
}

fn judge_servers(core: &Core) {
    let now = core.judging_time();
    let changed = core.cluster.lock().tick(now);
    for (server, state) in changed {
        tracing::warn!(%server, %state, "a storage server has been silent for too long");
        core.tell(silence(core, server, state));
    }
    let changed = core.cluster.lock().compare_paces();
    for (server, times) in changed {
        tracing::warn!(%server, ?times, "a storage server has become slow, or is no longer");
        let place = format!("storage server {server}");
        core.tell(match times {
            Some(times) => Note::new(Severity::Warning, place, format!("is {times:.0} times as slow as the others"))
                .meaning("what is read from it and written to it waits")
                .doing("it gets fewer new blocks; mounts read from others"),
            None => {
                Note::new(Severity::Info, place, "is as fast as the others again, or was hardly asked for a minute")
                    .doing("it gets its share of new blocks")
            }
        });
    }
}

fn silence(core: &Core, server: ServerId, state: ServerState) -> Note {
    let note = Note::new(Severity::Warning, format!("storage server {server}"), format!("is silent, and {state}"));
    if state != ServerState::Down {
        return note.meaning("none yet").doing("mounts read from, and write to, others when it is late");
    }
    let note = note.meaning("blocks that it has are one copy short while it is away");
    match core.cluster.lock().standing(server) {
        Some(Standing::Maintenance { .. }) => note.doing("it has leave: nothing is copied"),
        Some(Standing::Leaving) => note.doing("its blocks are copied to others now"),
        _ => note
            .doing(format!("its blocks are copied to others if it stays away for {} s", core.replace_after.as_secs())),
    }
}

/// Has servers whose maintenance should be over count as any other.
async fn end_maintenance(core: &Core, proposer: &Proposer) {
    let overdue = core.cluster.lock().overdue(core.clock.now());
    for server in overdue {
        match core.stand(proposer, server, Standing::Serving).await {
            Ok(()) => {
                core.tell(Note::new(Severity::Info, format!("storage server {server}"), "its maintenance is over"))
            }
            Err(refusal) => tracing::debug!(%server, %refusal, "the end of a maintenance could not be recorded yet"),
        }
    }
}

async fn expire_sessions(core: &Core, proposer: &Proposer, timeout: Duration) {
    if core.is_recovering() {
        // Who has said what it had done waits for the others in silence.
        return;
    }
    let now = core.judging_time();
    let expired = core.sessions.lock().expired(now, timeout);
    for session in expired {
        tracing::warn!(%session, "a mount has been silent for too long: its session ends");
        let note = Note::new(Severity::Warning, format!("mount {session}"), "has been silent for too long");
        core.tell(
            note.meaning("what it has not stored is lost if it does not come back")
                .doing("its session ends: what it had open and locked is released"),
        );
        match proposer.expire(session, timeout).await {
            Ok(_) => {}
            Err(refusal) => tracing::debug!(%session, %refusal, "the end of a session could not be recorded yet"),
        }
    }
}

/// Deletes what has no name and is open nowhere. After a restart not before every mount has said what it holds open.
async fn reclaim_orphans(core: &Core, proposer: &Proposer) -> Result<(), Fault> {
    let mut after = Ino(0);
    while !core.is_recovering() && core.sessions.lock().all_confirmed() {
        let page = orphans::orphans_after(&*core.store.view()?, after, RECLAIM_BATCH)?;
        let Some(last) = page.last().copied() else { break };
        let mut inos = page;
        inos.retain(|ino| !core.sessions.lock().is_open(*ino));
        if !inos.is_empty() {
            match proposer.propose(Command::Reclaim { inos }).await {
                // The same page again: the rest of a huge file.
                Ok((_, Ok(Reply::Reclaimed { unfinished: true }))) => continue,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        after = last;
    }
    Ok(())
}
