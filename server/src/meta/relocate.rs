//! Copies that are not needed where they are, because there are enough elsewhere.

use holdfast_common::{BlockHash, ServerId, net::Peers};

use super::{
    committer::Proposer,
    core::{Core, Fault},
    state::{Command, blocks},
    strays,
};

/// Takes `server` off the record of those of `page` that have enough copies on other servers that are up, and has its copies deleted.
/// Returns of how many it is off the record now.
pub async fn retire(
    core: &Core,
    proposer: &Proposer,
    peers: &dyn Peers,
    server: ServerId,
    page: &[BlockHash],
) -> Result<usize, Fault> {
    let (counting, is_up) = {
        let cluster = core.cluster.lock();
        (cluster.counting(), cluster.is_up(server))
    };
    let blocks = spare(core, server, page, &counting)?;
    if blocks.is_empty() {
        return Ok(0);
    }
    let answer = proposer.propose(Command::Retire { server, blocks: blocks.clone(), counting }).await;
    if is_up {
        // Whoever is down has them deleted as strays when it comes back.
        strays::delete_condemned(core, peers, server, answer).await;
    }
    let view = core.store.view()?;
    let mut off = 0;
    for block in &blocks {
        let holds = blocks::block(&*view, *block)?.is_some_and(|row| row.holders.contains(&server));
        off += usize::from(!holds);
    }
    Ok(off)
}

/// Those of which it seems to be so now: the entry decides.
fn spare(core: &Core, server: ServerId, page: &[BlockHash], counting: &[ServerId]) -> Result<Vec<BlockHash>, Fault> {
    let view = core.store.view()?;
    let mut spare = Vec::new();
    for block in page {
        let Some(row) = blocks::block(&*view, *block)?.filter(|row| row.refs > 0) else { continue };
        let others = row.holders.iter().filter(|holder| **holder != server && counting.contains(holder)).count();
        if row.holders.contains(&server) && others >= row.wanted {
            spare.push(*block);
        }
    }
    Ok(spare)
}
