//! Storage servers as their heartbeats show them. Pure: time comes in.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use holdfast_common::{
    BootId, ServerId,
    cluster::{ClusterMap, ServerInfo, ServerState},
    limits::{REPLICAS, REPLICAS_MIN},
    net::{
        Endpoint,
        identity::{NodeName, Role},
    },
    wire::{
        meta::{ServerStatus, StatFs, StorageLoad},
        storage::Source,
    },
};

use super::state::rows::ServerRow;

/// Bytes of free space that count as one unit of weight.
const WEIGHT_UNIT: u64 = 64 << 20;
const WEIGHT_MAX: u64 = 1_000_000;

/// What a storage server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    pub address: SocketAddr,
    pub zone: String,
    pub boot: BootId,
    pub load: StorageLoad,
}

#[derive(Debug)]
struct Member {
    info: ServerInfo,
    boot: BootId,
    load: StorageLoad,
    heard: Duration,
}

/// Membership. Times are of a monotonic clock.
#[derive(Debug)]
pub struct Cluster {
    members: BTreeMap<ServerId, Member>,
    version: u64,
    suspect_after: Duration,
    down_after: Duration,
}

impl Cluster {
    /// `version` must be larger than any map's of an earlier life. Servers that were registered before are suspect
    /// until they are heard.
    pub fn new(
        version: u64,
        registered: Vec<(ServerId, ServerRow)>,
        now: Duration,
        suspect_after: Duration,
        down_after: Duration,
    ) -> Self {
        let member = |(id, row): (ServerId, ServerRow)| {
            let info = ServerInfo { id, address: row.address, zone: row.zone, state: ServerState::Suspect, weight: 0 };
            (id, Member { info, boot: BootId(0), load: StorageLoad::default(), heard: now })
        };
        Self { members: registered.into_iter().map(member).collect(), version, suspect_after, down_after }
    }

    /// `true`: the server is new here, or has moved, and has to be registered.
    #[must_use]
    pub fn is_news(&self, id: ServerId, beat: &Heartbeat) -> bool {
        self.members.get(&id).is_none_or(|member| member.info.address != beat.address || member.info.zone != beat.zone)
    }

    pub fn heard(&mut self, id: ServerId, beat: Heartbeat, now: Duration) {
        let old = self.members.get(&id).map(|member| member.info.clone());
        let weight = weight(beat.load.free_bytes, old.as_ref().map_or(0, |info| info.weight));
        let info = ServerInfo { id, address: beat.address, zone: beat.zone, state: ServerState::Up, weight };
        if old.as_ref() != Some(&info) {
            self.version += 1;
        }
        self.members.insert(id, Member { info, boot: beat.boot, load: beat.load, heard: now });
    }

    /// Shortens everybody's silence by a time in which nobody could be heard.
    pub fn forgive(&mut self, missed: Duration, now: Duration) {
        self.members.values_mut().for_each(|member| member.heard = now.min(member.heard + missed));
    }

    /// Judges everybody by how long they have been silent. Returns those whose state changed.
    pub fn tick(&mut self, now: Duration) -> Vec<(ServerId, ServerState)> {
        let mut changed = Vec::new();
        for (id, member) in &mut self.members {
            let silent = now.saturating_sub(member.heard);
            let state = match member.info.state {
                _ if silent >= self.down_after => ServerState::Down,
                ServerState::Up if silent >= self.suspect_after => ServerState::Suspect,
                state => state,
            };
            if state != member.info.state {
                member.info.state = state;
                changed.push((*id, state));
            }
        }
        self.version += u64::from(!changed.is_empty());
        changed
    }

    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn map(&self) -> ClusterMap {
        ClusterMap { version: self.version, servers: self.members.values().map(|member| member.info.clone()).collect() }
    }

    pub fn is_up(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.info.state == ServerState::Up)
    }

    pub fn up(&self) -> Vec<ServerId> {
        let up = self.members.values().filter(|member| member.info.state == ServerState::Up);
        up.map(|member| member.info.id).collect()
    }

    /// Those that have been down for `long`.
    pub fn down_for(&self, long: Duration, now: Duration) -> Vec<ServerId> {
        let gone = |member: &&Member| {
            let silent = now.saturating_sub(member.heard);
            member.info.state == ServerState::Down && silent >= self.down_after + long
        };
        self.members.values().filter(gone).map(|member| member.info.id).collect()
    }

    pub fn boot(&self, id: ServerId) -> Option<BootId> {
        self.members.get(&id).map(|member| member.boot)
    }

    /// Changes whenever the server has been started anew, or may have lost something.
    pub fn life(&self, id: ServerId) -> Option<(BootId, u64)> {
        self.members.get(&id).map(|member| (member.boot, member.load.started_ms))
    }

    pub fn endpoint(&self, id: ServerId) -> Option<Endpoint> {
        let member = self.members.get(&id)?;
        Some(Endpoint { address: member.info.address, name: NodeName { role: Role::Storage, id: id.0 } })
    }

    /// Where copies that `holders` have can be fetched: those that are up first, those that are down not at all.
    pub fn sources(&self, holders: &[ServerId]) -> Vec<Source> {
        let mut found: Vec<&ServerInfo> = holders
            .iter()
            .filter_map(|id| self.members.get(id))
            .map(|member| &member.info)
            .filter(|info| info.state != ServerState::Down)
            .collect();
        found.sort_by_key(|info| info.state != ServerState::Up);
        found.into_iter().map(|info| Source { server: info.id, address: info.address }).collect()
    }

    pub fn status(&self, now: Duration) -> Vec<ServerStatus> {
        let status = |member: &Member| ServerStatus {
            id: member.info.id,
            address: member.info.address,
            zone: member.info.zone.clone(),
            state: member.info.state,
            weight: member.info.weight,
            silent_ms: millis(now.saturating_sub(member.heard)),
            boot: member.boot,
            load: member.load,
        };
        self.members.values().map(status).collect()
    }

    /// What can be stored when each byte is kept on `REPLICAS` distinct servers (fewer if there are fewer).
    pub fn space(&self, inodes: u64) -> StatFs {
        let usable = || self.members.values().filter(|member| member.info.state != ServerState::Down);
        let storable = |bytes: fn(&StorageLoad) -> u64| storable(&usable().map(|m| bytes(&m.load)).collect::<Vec<_>>());
        StatFs {
            capacity_bytes: storable(|load| load.capacity_bytes),
            free_bytes: storable(|load| load.free_bytes),
            inodes,
        }
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Follows free space, but not its every move: a new map for each percent would help nobody.
fn weight(free_bytes: u64, old: u32) -> u32 {
    let new = u32::try_from((free_bytes / WEIGHT_UNIT).min(WEIGHT_MAX)).unwrap_or(u32::MAX);
    if old > 0 && new > 0 && new.abs_diff(old) <= old / 8 { old } else { new }
}

/// The largest `b` so that `b` bytes can be kept on that many distinct servers: each takes at most `b` of them.
fn storable(bytes: &[u64]) -> u64 {
    let copies = bytes.len().min(REPLICAS);
    if copies < REPLICAS_MIN {
        return 0;
    }
    let copies = copies as u128;
    let fits = |b: u64| bytes.iter().map(|have| u128::from(*have.min(&b))).sum::<u128>() >= u128::from(b) * copies;
    let all = bytes.iter().map(|have| u128::from(*have)).sum::<u128>();
    let (mut low, mut high) = (0, u64::try_from(all / copies).unwrap_or(u64::MAX));
    while low < high {
        let middle = high - (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn cluster() -> Cluster {
        Cluster::new(100, Vec::new(), Duration::ZERO, 2 * SECOND, 10 * SECOND)
    }

    fn beat(free_bytes: u64) -> Heartbeat {
        let load = StorageLoad { free_bytes, capacity_bytes: free_bytes, ..StorageLoad::default() };
        Heartbeat { address: ([127, 0, 0, 1], 7).into(), zone: String::new(), boot: BootId(1), load }
    }

    #[test]
    fn silence_makes_a_server_suspect_then_down_and_a_word_makes_it_up() {
        let mut cluster = cluster();
        cluster.heard(ServerId(1), beat(1 << 40), SECOND);
        let mut states = Vec::new();
        for second in 1..=12 {
            states.extend(cluster.tick(second * SECOND).into_iter().map(|(_, state)| (second, state)));
        }
        assert_eq!(states, [(3, ServerState::Suspect), (11, ServerState::Down)]);
        let before = cluster.version();
        cluster.heard(ServerId(1), beat(1 << 40), 20 * SECOND);
        assert!(cluster.is_up(ServerId(1)));
        assert_eq!(cluster.version(), before + 1);
    }

    #[test]
    fn the_map_changes_only_when_there_is_something_to_say() {
        let mut cluster = cluster();
        assert!(cluster.is_news(ServerId(1), &beat(1 << 40)));
        cluster.heard(ServerId(1), beat(1 << 40), SECOND);
        assert!(!cluster.is_news(ServerId(1), &beat(1 << 39)));
        let version = cluster.version();
        cluster.heard(ServerId(1), beat((1 << 40) - (1 << 36)), SECOND);
        assert_eq!(cluster.version(), version, "a sixteenth less free");
        cluster.heard(ServerId(1), beat(1 << 39), SECOND);
        assert_eq!(cluster.version(), version + 1, "half of it gone");
        cluster.heard(ServerId(1), beat(1 << 20), SECOND);
        assert_eq!(cluster.map().servers[0].weight, 0, "full");
    }

    #[test]
    fn space_is_counted_once_however_many_copies_there_are() {
        for (bytes, expected) in [
            (vec![], 0),
            (vec![10], 0),
            (vec![10, 4], 4),
            (vec![10, 10, 10], 10),
            (vec![100, 100, 7], 7),
            (vec![9, 9, 9, 9], 12),
            (vec![100, 1, 1, 1], 1),
            (vec![6, 6, 6, 3, 3], 8),
        ] {
            assert_eq!(storable(&bytes), expected, "{bytes:?}");
        }
    }
}
