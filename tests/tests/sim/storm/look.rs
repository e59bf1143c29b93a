//! Questions to the cluster.

use super::*;

pub(super) async fn ask_meta(peers: &dyn Peers, request: &MetaRequest) -> Result<MetaReply, Wrong> {
    let frame = Frame { header: encode(request).expect("a short request"), payload: Vec::new() };
    let to = Ether::endpoint(META);
    let answer = peers.call(to, frame, Duration::from_secs(5)).await.map_err(|error| error.to_string())?;
    Ok(decode(&answer.header).expect("an answer"))
}

pub(super) async fn ask(admin: &Host, request: AdminRequest) -> Result<MetaAnswer, Wrong> {
    let reply = ask_meta(admin, &MetaRequest::Admin(request)).await?;
    reply.result.map_err(|refusal| refusal.to_string())
}

/// Every invariant of the metadata holds, whenever they can be looked at.
pub(super) async fn nothing_is_violated(admin: &Host) -> Result<(), Wrong> {
    match ask(admin, AdminRequest::Check).await {
        Ok(MetaAnswer::Violations(found)) if !found.is_empty() => Err(format!("violated: {found:?}")),
        _ => Ok(()),
    }
}

/// Nobody has found a copy missing or bad: not a mount that wanted to read it, nor who compares servers with the record.
pub(super) async fn nothing_is_missed(admin: &Host) -> Result<(), Wrong> {
    let Ok(MetaAnswer::Journal(entries)) = ask(admin, AdminRequest::Journal { after: 0 }).await else { return Ok(()) };
    let missed =
        entries.iter().find(|entry| [MISSES_COPIES, HAS_BAD_COPIES].iter().any(|sign| entry.what.contains(sign)));
    if let Some(entry) = missed {
        return Err(format!("{} {}, though no disk has lost anything", entry.place, entry.what));
    }
    let Ok(ClusterStatus { corrupt_copies_met, missing_copies_met, .. }) = status(admin).await else { return Ok(()) };
    match corrupt_copies_met + missing_copies_met {
        0 => Ok(()),
        missed => Err(format!("mounts have found {missed} copies missing or bad, though no disk has lost anything")),
    }
}

pub(super) async fn set_replicas(admin: &Host, count: usize) -> Result<(), Wrong> {
    let replicas = Replicas::new(count).expect("a number in the range");
    match ask(admin, AdminRequest::SetReplicas { replicas }).await? {
        MetaAnswer::Done => Ok(()),
        other => Err(format!("{count} copies: {other:?}")),
    }
}

pub(super) async fn stand(admin: &Host, server: u32, standing: Standing) -> Result<(), Wrong> {
    match ask(admin, AdminRequest::StandDespite { server: ServerId(server), standing }).await? {
        MetaAnswer::Done => Ok(()),
        other => Err(format!("server {server} is to be {standing}: {other:?}")),
    }
}

pub(super) async fn status(admin: &Host) -> Result<ClusterStatus, Wrong> {
    match ask(admin, AdminRequest::Status).await? {
        MetaAnswer::Status(status) => Ok(*status),
        other => Err(format!("a status was {other:?}")),
    }
}

/// Asks again until it is so.
pub(super) async fn until<F: Future<Output = Result<(), Wrong>>>(mut look: impl FnMut() -> F) -> Result<(), Wrong> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(()) => return Ok(()),
            Err(wrong) if tokio::time::Instant::now() > until => return Err(wrong),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

pub(super) async fn until_up(admin: &Host) -> Result<(), Wrong> {
    until(|| async {
        let up = status(admin)
            .await?
            .servers
            .iter()
            .filter(|it| it.state == holdfast_common::cluster::ServerState::Up)
            .count();
        if up == STORAGE.count() { Ok(()) } else { Err(format!("{up} servers are up")) }
    })
    .await
}

/// Three copies of everything, where they are on record, in as many zones as there are, and nothing else.
pub(super) async fn until_whole(admin: &Host) -> Result<(), Wrong> {
    until(|| async {
        let status = status(admin).await?;
        let ClusterStatus { owed, unnamed, condemned, blocks_by_copies: [none, one, two, _], .. } = status;
        if status.replicas_followed_percent != 100 {
            return Err(format!("{} % follow the number of copies", status.replicas_followed_percent));
        }
        if [owed, unnamed, condemned, none, one, two] != [0; 6] {
            return Err(format!("{owed} owed, {unnamed} unnamed, {condemned} condemned, copies {none} {one} {two}"));
        }
        match ask(admin, AdminRequest::Check).await? {
            MetaAnswer::Violations(found) if found.is_empty() => {}
            other => return Err(format!("{other:?}")),
        }
        for server in &status.servers {
            let mut has = 0;
            for bucket in BUCKETS {
                let request = AdminRequest::Compare { server: server.id, bucket, mend: false };
                match ask(admin, request).await? {
                    MetaAnswer::Compared(Comparison { missing: 0, extra: 0, on_record, .. }) => has += on_record,
                    other => return Err(format!("server {}: {other:?}", server.id)),
                }
            }
            let alone = status.servers.iter().filter(|other| other.zone == server.zone).count() == 1;
            if alone && has != status.blocks {
                return Err(format!("the only server of zone {} has {has} of {} blocks", server.zone, status.blocks));
            }
        }
        Ok(())
    })
    .await
}
