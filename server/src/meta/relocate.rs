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
    let answer = proposer.propose(Command::Retire { server, blocks: page.to_vec(), counting }).await;
    if is_up {
        // Whoever is down has them deleted as strays when it comes back.
        strays::delete_condemned(core, peers, server, answer).await;
    }
    let view = core.store.view()?;
    let mut off = 0;
    for block in page {
        let holds = blocks::block(&*view, *block)?.is_some_and(|row| row.holders.contains(&server));
        off += usize::from(!holds);
    }
    Ok(off)
}
