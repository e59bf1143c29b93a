//! Where a block belongs: weighted rendezvous hashing. Pure.
//!
//! Each server draws a score from (block, server) alone, so that adding or removing one moves
//! only the blocks that it wins or loses (Thaler and Ravishankar, "A Name-Based Mapping Scheme for
//! Rendezvous", 1996; the weighted form, -weight / ln(u), is from Schindelhauer and Schomaker, 2005).

use std::collections::BTreeSet;

use crate::block::BlockHash;
use crate::cluster::{ClusterMap, ServerInfo, ServerState};
use crate::types::ServerId;

/// Servers that may take a copy of `block`, best first. Those in zones not yet used come before
/// the others. Contains only servers that are up, with a weight above 0.
pub fn candidates(map: &ClusterMap, block: BlockHash) -> Vec<ServerId> {
    candidates_beside(map, block, &[], |_| false)
}

/// Servers that may take one more copy of `block` beside those that `holders` keep, best first: in zones where none of
/// them is before the others. Without those that are `excluded`.
pub fn candidates_beside(
    map: &ClusterMap,
    block: BlockHash,
    holders: &[ServerId],
    excluded: impl Fn(ServerId) -> bool,
) -> Vec<ServerId> {
    let mut scored: Vec<(f64, &ServerInfo)> = map
        .servers
        .iter()
        .filter(|server| server.state == ServerState::Up && server.weight > 0 && !excluded(server.id))
        .map(|server| (score(block, server.id, server.weight), server))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.id.cmp(&b.1.id)));
    let used = holders.iter().filter_map(|holder| map.server(*holder)).map(|server| server.zone.as_str()).collect();
    distinct_zones_first(used, scored.into_iter().map(|(_, server)| server).collect())
}

/// In how many zones `servers` are. One without a zone is as far from every other as if it had one of its own.
pub fn zones(map: &ClusterMap, servers: impl IntoIterator<Item = ServerId>) -> usize {
    let zone = |server: &ServerInfo| (server.zone.clone(), if server.zone.is_empty() { server.id.0 } else { 0 });
    servers.into_iter().filter_map(|id| map.server(id)).map(zone).collect::<BTreeSet<_>>().len()
}

/// `zones`: that are used already.
fn distinct_zones_first<'a>(mut zones: Vec<&'a str>, ranked: Vec<&'a ServerInfo>) -> Vec<ServerId> {
    let mut first = Vec::new();
    let mut rest = Vec::new();
    for server in ranked {
        if server.zone.is_empty() || !zones.contains(&server.zone.as_str()) {
            zones.push(&server.zone);
            first.push(server.id);
        } else {
            rest.push(server.id);
        }
    }
    first.extend(rest);
    first
}

fn score(block: BlockHash, server: ServerId, weight: u32) -> f64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block.0);
    hasher.update(&server.0.to_le_bytes());
    let mut word = [0; 8];
    word.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    // 53 bits, shifted by a half so that neither 0 nor 1 can be drawn: ln is finite and below 0.
    let unit = ((u64::from_le_bytes(word) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(weight) / unit.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Replicas;

    fn map(weights: &[u32]) -> ClusterMap {
        let servers = (1..)
            .zip(weights)
            .map(|(id, &weight)| ServerInfo { id: ServerId(id), weight, ..ServerInfo::example() })
            .collect();
        ClusterMap { version: 1, servers, replicas: Replicas::INHERITED }
    }

    #[test]
    fn the_order_is_frozen() {
        let orders: Vec<Vec<u32>> = (0u8..4)
            .map(|seed| candidates(&map(&[100; 5]), BlockHash::of(&[seed])).iter().map(|id| id.0).collect())
            .collect();
        assert_eq!(orders, FROZEN);
    }

    const FROZEN: [[u32; 5]; 4] = [[2, 4, 3, 5, 1], [4, 2, 5, 1, 3], [2, 4, 1, 3, 5], [1, 4, 5, 3, 2]];

    #[test]
    fn load_follows_weight_within_a_twentieth() {
        let map = map(&[100, 100, 200]);
        let heavy =
            (0u32..6000).filter(|seed| candidates(&map, BlockHash::of(&seed.to_le_bytes()))[0] == ServerId(3)).count();
        assert!((2850..3150).contains(&heavy), "{heavy} of 6000 blocks chose the server with half the weight");
    }

    #[test]
    fn a_server_that_leaves_moves_only_its_own_blocks() {
        let (all, fewer) = (map(&[100; 5]), map(&[100, 100, 0, 100, 100]));
        for seed in 0u32..500 {
            let hash = BlockHash::of(&seed.to_le_bytes());
            let mut before = candidates(&all, hash);
            before.retain(|id| id.0 != 3);
            assert_eq!(before, candidates(&fewer, hash));
        }
    }

    #[test]
    fn copies_spread_over_zones_first() {
        let mut map = map(&[100; 4]);
        for (server, zone) in map.servers.iter_mut().zip(["a", "a", "b", "b"]) {
            server.zone = zone.into();
        }
        for seed in 0u32..100 {
            let block = BlockHash::of(&seed.to_le_bytes());
            let chosen = candidates(&map, block);
            let beside = candidates_beside(&map, block, &[ServerId(1)], |id| id == ServerId(1));
            assert_eq!(beside.len(), 3);
            assert_ne!(beside[0], ServerId(2), "another zone has none yet");
            let zone_of = |id: ServerId| map.servers.iter().find(|s| s.id == id).unwrap().zone.clone();
            assert_ne!(zone_of(chosen[0]), zone_of(chosen[1]));
        }
    }
}
