//! Blocks on their way to storage servers: straight to each, or to one that passes them on.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use holdfast_common::{
    Block, Epoch, Refusal, ServerId,
    cluster::{ClusterMap, ServerInfo, ServerState},
    config::Relaying,
    enough_replicas,
    limits::{BLOCK_SIZE_MAX, PASSED_ON_MAX, PUT_BATCH_MAX},
    net::{Frame, probe::until_mute},
    placement,
    wire::{
        meta::{Holder, NewBlock},
        storage::{PutBlock, StorageAnswer, StorageReply, StorageRequest},
    },
};
use tracing::{error, warn};

use super::{
    blocks::{BlockClient, frame},
    retry::Retry,
};
use crate::fs::{Errno, FsResult};

/// Of shorter blocks the messages cost more than the bytes: they go to each server in one message with others.
const RELAY_MIN: u32 = 32 << 10;
/// How long a server that passes a block on waits for one of the others, at most; and no longer than half of the mount's patience.
const RELAY_PATIENCE: Duration = Duration::from_secs(5);

impl BlockClient {
    /// Puts each block on as many servers as are `wanted`, or on fewer, but enough, when no others can take it (the commit will owe them).
    /// With fewer it retries until the mount's patience ends: then `EIO`, or `ENOSPC` if servers that are there are full; that at once when too
    /// few servers are left that are not, even with those that are away.
    /// The answer: for each block its holders, as a commit names them.
    pub async fn put(&self, blocks: &[Block], durable: bool, wanted: usize) -> FsResult<Vec<NewBlock>> {
        let (epoch, enough) = (self.meta.epoch(), enough_replicas(wanted));
        let mut puts: Vec<PutState> = blocks.iter().map(|block| PutState::new(block, epoch, wanted)).collect();
        let mut retry = Retry::within(self.io_timeout);
        loop {
            self.put_rounds(&mut puts, durable).await;
            if puts.iter().all(|put| put.holders.len() >= enough) {
                return Ok(puts.into_iter().map(PutState::into_named).collect());
            }
            let map = self.meta.map();
            let lacks_room = |awaited| puts.iter().any(|put| put.lacks_room(&map, enough, awaited));
            if lacks_room(Awaited::Everybody) {
                error!("the storage servers are full");
                return Err(Errno(libc::ENOSPC));
            }
            let (paused, ()) = tokio::join!(retry.pause(), self.meta.refresh_map());
            if paused.is_err() && lacks_room(Awaited::Nobody) {
                error!(within = ?self.io_timeout, "the storage servers that are there are full");
                return Err(Errno(libc::ENOSPC));
            }
            if paused.is_err() {
                error!(within = ?self.io_timeout, "fewer than {enough} storage servers took the data");
                return Err(Errno(libc::EIO));
            }
            puts.iter_mut().for_each(PutState::forget_failures);
        }
    }

    /// Rounds of parallel puts until every block has its copies or has run out of candidates.
    async fn put_rounds(&self, puts: &mut [PutState<'_>], durable: bool) {
        loop {
            let round = self.assign(puts);
            if round.is_empty() {
                return;
            }
            let mut calls: FuturesUnordered<_> = round
                .into_iter()
                .map(|parcel| {
                    let request = self.put_request(puts, &parcel, durable);
                    async move {
                        let results = self.send(&parcel, request, durable).await;
                        (parcel, results)
                    }
                })
                .collect();
            while let Some((parcel, results)) = calls.next().await {
                for member in parcel.members {
                    results.iter().for_each(|(server, result)| puts[member].learn(*server, *result));
                }
            }
        }
    }

    /// What is sent to whom next.
    fn assign(&self, puts: &[PutState<'_>]) -> Vec<Parcel> {
        let map = self.meta.map();
        let (mut relayed, mut straight) = (Vec::new(), BTreeMap::<ServerId, Vec<usize>>::new());
        for (member, put) in puts.iter().enumerate() {
            let servers = self.next_servers(&map, put);
            match servers.split_first() {
                Some((first, others)) if self.is_relayed(&map, put, &servers) => {
                    relayed.push(Parcel { to: *first, members: vec![member], then: others.to_vec() });
                }
                _ => servers.into_iter().for_each(|server| straight.entry(server).or_default().push(member)),
            }
        }
        let batched = straight.into_iter().flat_map(|(to, members)| {
            batches(members, puts).into_iter().map(move |members| Parcel { to, members, then: Vec::new() })
        });
        relayed.into_iter().chain(batched).collect()
    }

    /// Who should be asked next for a block.
    fn next_servers(&self, map: &ClusterMap, put: &PutState<'_>) -> Vec<ServerId> {
        let mut holders: Vec<ServerId> = put.holders.iter().map(|holder| holder.server).collect();
        let missing = put.wanted.saturating_sub(holders.len());
        let next = |holders: &[ServerId], avoided: bool| {
            placement::candidates_beside(map, put.block.hash(), holders, |server| {
                put.tried.contains(&server) || holders.contains(&server) || self.health.avoided(server) != avoided
            })
        };
        let well = next(&holders, false);
        holders.extend(well.into_iter().take(missing));
        // A server that has just failed is asked only when the block would not be safe without it.
        let needed = enough_replicas(put.wanted).saturating_sub(holders.len());
        if needed > 0 {
            let avoided = next(&holders, true);
            holders.extend(avoided.into_iter().take(needed));
        }
        holders.split_off(put.holders.len())
    }

    fn is_relayed(&self, map: &ClusterMap, put: &PutState<'_>, servers: &[ServerId]) -> bool {
        let is_here = |server: &ServerId| map.server(*server).is_none_or(|info| self.near.is_here(info.address.ip()));
        // Small blocks are many: what costs little is asked first.
        put.block.length() >= RELAY_MIN
            && !put.straight
            && (2..=PASSED_ON_MAX + 1).contains(&servers.len())
            && match self.relaying {
                Relaying::Never => false,
                Relaying::Always => true,
                Relaying::Auto => !servers.iter().any(is_here),
            }
            && self.health.may_relay(servers[0])
            && !servers.iter().any(|server| self.health.avoided(*server))
    }

    fn put_request(&self, puts: &[PutState<'_>], parcel: &Parcel, durable: bool) -> Frame {
        let block = |member: &usize| {
            let PutState { block, epoch, .. } = &puts[*member];
            PutBlock { hash: block.hash(), length: block.length(), epoch: *epoch }
        };
        let blocks: Vec<PutBlock> = parcel.members.iter().map(block).collect();
        let request = match blocks.as_slice() {
            [block] if !parcel.then.is_empty() => StorageRequest::Relay {
                block: *block,
                durable,
                to: parcel.then.iter().filter_map(|server| self.source(*server)).collect(),
                patience_ms: u32::try_from(RELAY_PATIENCE.min(self.io_timeout / 2).as_millis()).unwrap_or(u32::MAX),
            },
            _ => StorageRequest::Put { blocks, durable },
        };
        let payload = parcel.members.iter().map(|member| puts[*member].block.bytes().clone()).collect();
        Frame { header: frame(&request).unwrap_or_default().header, payload }
    }

    /// What came of it at each server that gets the parcel.
    async fn send(&self, parcel: &Parcel, request: Frame, durable: bool) -> Vec<(ServerId, PutResult)> {
        if parcel.then.is_empty() {
            return vec![(parcel.to, self.put_straight(parcel.to, request).await)];
        }
        let results = self.send_on(parcel, request, durable).await;
        for (server, result) in &results {
            match result {
                Ok(_) => self.health.answered_elsewhere(*server),
                Err(PutTrouble::NotPassedOn) => self.health.not_passed_on(parcel.to),
                Err(PutTrouble::Full | PutTrouble::Failed) => {}
            }
        }
        results
    }

    /// To one that passes it on.
    async fn send_on(&self, parcel: &Parcel, request: Frame, durable: bool) -> Vec<(ServerId, PutResult)> {
        let servers = std::iter::once(parcel.to).chain(parcel.then.iter().copied());
        let reply = tokio::select! {
            reply = self.call_relay(parcel.to, request) => reply,
            never = self.watch(&parcel.then) => match never {},
        };
        match reply {
            Ok(StorageReply(Ok(StorageAnswer::Relayed { copies }))) if copies.len() == parcel.then.len() + 1 => servers
                .zip(copies)
                .map(|(server, copy)| match copy {
                    Ok(boot) => (server, Ok(Holder { server, boot, durable })),
                    Err(refusal) if server == parcel.to || is_full(&refusal) => {
                        (server, Err(refused(server, &refusal)))
                    }
                    Err(_) => (server, Err(PutTrouble::NotPassedOn)),
                })
                .collect(),
            // Whether it is this server that is in trouble, or what it was asked for, is seen when it is asked for less.
            Ok(other) => {
                warn!(server = %parcel.to, ?other, "a server does not pass a block on");
                servers.map(|server| (server, Err(PutTrouble::NotPassedOn))).collect()
            }
            Err(error) => {
                warn!(server = %parcel.to, %error, "a put that was to be passed on failed");
                let trouble = |server| if server == parcel.to { PutTrouble::Failed } else { PutTrouble::NotPassedOn };
                servers.map(|server| (server, Err(trouble(server)))).collect()
            }
        }
    }

    /// Notes which of `servers` turn out to be dead, so that who was waited for here is not asked once more, and waited for again.
    async fn watch(&self, servers: &[ServerId]) -> Infallible {
        let watch_one = |server: &ServerId| {
            let (server, endpoint) = (*server, self.endpoint(*server));
            async move {
                if let Some(endpoint) = endpoint {
                    let error = until_mute(&*self.peers, endpoint).await;
                    warn!(%server, %error, "a server to which a block is passed on does not answer");
                    self.health.failed(server);
                }
            }
        };
        join_all(servers.iter().map(watch_one)).await;
        std::future::pending().await
    }

    async fn put_straight(&self, server: ServerId, request: Frame) -> PutResult {
        let reply = self.call_watched(server, request, self.io_timeout).await.map_err(|error| {
            warn!(%server, %error, "a put failed");
            PutTrouble::Failed
        })?;
        match reply.0 {
            Ok(StorageAnswer::Put { boot, durable }) => Ok(Holder { server, boot, durable }),
            Err(refusal) => Err(refused(server, &refusal)),
            Ok(other) => {
                warn!(%server, ?other, "a put was answered with something else");
                Err(PutTrouble::Failed)
            }
        }
    }
}

fn is_full(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::ServerFull | Refusal::NoSpace)
}

fn refused(server: ServerId, refusal: &Refusal) -> PutTrouble {
    if is_full(refusal) {
        return PutTrouble::Full;
    }
    warn!(%server, ?refusal, "a put was refused");
    PutTrouble::Failed
}

/// One message to one server.
struct Parcel {
    to: ServerId,
    /// Indexes of what is in it; one only if it is to be passed on.
    members: Vec<usize>,
    /// Whom it is passed on to.
    then: Vec<ServerId>,
}

type PutResult = Result<Holder, PutTrouble>;

/// One block on its way to its servers.
struct PutState<'a> {
    block: &'a Block,
    epoch: Epoch,
    /// Copies.
    wanted: usize,
    holders: Vec<Holder>,
    tried: Vec<ServerId>,
    /// They have refused it for want of room.
    full: Vec<ServerId>,
    /// Passing it on has failed once.
    straight: bool,
}

/// Whether servers that are away may still come back in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Everybody,
    Nobody,
}

#[derive(Clone, Copy, Debug)]
enum PutTrouble {
    Full,
    Failed,
    /// By the server that was to do so; perhaps it can be asked by who writes.
    NotPassedOn,
}

impl<'a> PutState<'a> {
    fn new(block: &'a Block, epoch: Epoch, wanted: usize) -> Self {
        let (holders, tried) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
        Self { block, epoch, wanted, holders, tried, full: Vec::new(), straight: false }
    }

    fn into_named(self) -> NewBlock {
        let Self { block, epoch, holders, .. } = self;
        NewBlock { hash: block.hash(), length: block.length(), holders, epoch }
    }

    /// Servers are full, and without them not enough are left, even if those took it that have just failed.
    fn lacks_room(&self, map: &ClusterMap, enough: usize, awaited: Awaited) -> bool {
        let holds = |server: &ServerInfo| self.holders.iter().any(|holder| holder.server == server.id);
        // Those who have said that they have no room are not even asked.
        let is_full = |server: &ServerInfo| {
            self.full.contains(&server.id) || server.state == ServerState::Up && server.weight == 0
        };
        let is_there = |server: &ServerInfo| server.state == ServerState::Up || awaited == Awaited::Everybody;
        let (mut full, mut left) = (0, 0);
        for server in &map.servers {
            match holds(server) {
                true => left += 1,
                false if is_full(server) => full += 1,
                false => left += usize::from(is_there(server)),
            }
        }
        full > 0 && left < enough
    }

    fn learn(&mut self, server: ServerId, result: PutResult) {
        if !matches!(result, Err(PutTrouble::NotPassedOn)) {
            self.tried.push(server);
        }
        match result {
            Ok(holder) => self.holders.push(holder),
            Err(PutTrouble::Full) => self.full.push(server),
            Err(PutTrouble::NotPassedOn) => self.straight = true,
            Err(PutTrouble::Failed) => {}
        }
    }

    /// Before another try: only those that have the block stay ruled out.
    fn forget_failures(&mut self) {
        self.tried = self.holders.iter().map(|holder| holder.server).collect();
        self.full.clear();
    }
}

/// Cuts what one server gets into messages that keep to the limits.
fn batches(members: Vec<usize>, puts: &[PutState<'_>]) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut bytes = 0;
    for member in members {
        let length = puts[member].block.length();
        match batches.last_mut() {
            Some(batch) if batch.len() < PUT_BATCH_MAX && bytes + length <= BLOCK_SIZE_MAX => batch.push(member),
            _ => {
                bytes = 0;
                batches.push(vec![member]);
            }
        }
        bytes += length;
    }
    batches
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use holdfast_common::BootId;

    use super::*;

    fn map(servers: &[(ServerState, u32)]) -> ClusterMap {
        let servers = servers.iter().zip(1..).map(|(&(state, weight), id)| ServerInfo {
            id: ServerId(id),
            state,
            weight,
            ..ServerInfo::example()
        });
        ClusterMap { servers: servers.collect(), ..ClusterMap::default() }
    }

    #[test]
    fn a_write_finds_no_room_when_too_few_servers_are_left_that_are_not_full() {
        use Awaited::{Everybody, Nobody};
        use ServerState::{Down, Up};
        let block = Block::seal(Bytes::from_static(b"block")).expect("a short block");
        let put = |holders: &[u32], full: &[u32]| {
            let mut put = PutState::new(&block, Epoch(0), 3);
            holders.iter().for_each(|id| {
                put.learn(ServerId(*id), Ok(Holder { server: ServerId(*id), boot: BootId(1), durable: true }));
            });
            full.iter().for_each(|id| put.learn(ServerId(*id), Err(PutTrouble::Full)));
            put
        };
        let [all_up, one_known_full] = [map(&[(Up, 9); 4]), map(&[(Up, 9), (Up, 9), (Up, 9), (Up, 0)])];
        assert!(!put(&[1], &[2]).lacks_room(&all_up, 2, Nobody), "two may take it yet");
        // What a simulated history found: one holds it, one has just failed, and two are full.
        assert!(!put(&[1], &[2]).lacks_room(&one_known_full, 2, Nobody), "who has failed may take it yet");
        assert!(put(&[1], &[2, 3]).lacks_room(&one_known_full, 2, Everybody));
        assert!(put(&[], &[1, 2, 3]).lacks_room(&all_up, 2, Everybody), "one alone is not enough");
        let one_away = map(&[(Up, 9), (Down, 0), (Up, 0), (Up, 0)]);
        assert!(!put(&[1], &[]).lacks_room(&one_away, 2, Everybody), "it may come back");
        assert!(put(&[1], &[]).lacks_room(&one_away, 2, Nobody), "it has not");
        let all_away = map(&[(Up, 9), (Down, 0), (Down, 0)]);
        assert!(!put(&[1], &[]).lacks_room(&all_away, 2, Nobody), "room is not what is missing");
    }
}
