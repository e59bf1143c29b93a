//! Storage servers as their heartbeats show them. Pure: time comes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use holdfast_common::{
    BlockHash, BootId, Replicas, ServerId, Time,
    cluster::{ClusterMap, ServerInfo, ServerState, Standing},
    enough_replicas,
    limits::REPLICAS,
    net::{
        Endpoint,
        identity::{NodeName, Role},
    },
    wire::{
        meta::{ServerStatus, StatFs, StorageLoad},
        storage::Source,
    },
};

use super::{
    budget::Foreground,
    pace::{Pace, Usual},
    rhythm::Rhythm,
    state::rows::ServerRow,
};

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
    /// As mounts see it: its state is what comes of the next two.
    info: ServerInfo,
    /// By its silence alone: up, suspect or down.
    state: ServerState,
    standing: Standing,
    /// While it is being emptied.
    left: Option<u64>,
    pace: Pace,
    rhythm: Rhythm,
    boot: BootId,
    load: StorageLoad,
    heard: Duration,
    /// What it has was compared with what it is on record for since it came up.
    looked_through: bool,
    /// What it said when it stopped by itself.
    complaint: Option<String>,
    /// Why it cannot be emptied now; empty: nothing hinders.
    hindered: String,
    /// When its appearance became what it is.
    since: Duration,
}

impl Member {
    /// Of which nothing is known but this.
    fn new(info: ServerInfo, state: ServerState, standing: Standing, now: Duration) -> Self {
        Self {
            info,
            state,
            standing,
            left: None,
            pace: Pace::default(),
            rhythm: Rhythm::default(),
            boot: BootId(0),
            load: StorageLoad::default(),
            heard: now,
            looked_through: false,
            complaint: None,
            hindered: String::new(),
            since: now,
        }
    }

    /// As operators see it.
    fn appearance(&self) -> (ServerState, Standing) {
        let joins = self.state == ServerState::Up && !self.looked_through;
        (if joins { ServerState::Joining } else { self.state }, self.standing)
    }

    /// In quarters of what its processors or its disk can do.
    fn busy(&self) -> u32 {
        self.load.cpu_percent.max(self.load.disk_busy_percent) / 25
    }

    fn change(&mut self, now: Duration, change: impl FnOnce(&mut Self)) {
        let before = self.appearance();
        change(self);
        if self.appearance() != before {
            self.since = now;
        }
    }

    /// Why it is as it is, in words; empty if that is as it should be.
    fn reason(&self, now: Duration) -> String {
        let of_state = match (self.state, &self.complaint) {
            (ServerState::Up, _) => self.reason_while_up(now),
            (_, Some(complaint)) => Some(format!("has stopped: {complaint}")),
            (_, None) if self.boot == BootId(0) => Some("not heard since the metadata server was started".to_owned()),
            (_, None) => Some("silent".to_owned()),
        };
        let of_standing = (self.standing != Standing::Serving).then(|| "the operator wants it so".to_owned());
        [of_state, of_standing].into_iter().flatten().collect::<Vec<String>>().join("; ")
    }

    fn reason_while_up(&self, now: Duration) -> Option<String> {
        let serves = self.standing == Standing::Serving;
        if !self.looked_through {
            Some("what it has is being compared with what it is on record for".to_owned())
        } else if !self.rhythm.is_steady(now) {
            Some("came and went too often: it gets no new blocks for a while".to_owned())
        } else if self.pace.is_slow() {
            let [put, get, sync] = self.pace.means_us();
            Some(format!("slow, {put} us for a put, {get} for a get, {sync} for a sync: it gets fewer new blocks"))
        } else {
            (serves && self.info.weight == 0).then(|| "full: it gets no new blocks".to_owned())
        }
    }
}

/// Membership. Times are of a monotonic clock.
#[derive(Debug)]
pub struct Cluster {
    members: BTreeMap<ServerId, Member>,
    version: u64,
    suspect_after: Duration,
    down_after: Duration,
    replicas: Replicas,
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
            let (state, standing) = (ServerState::Suspect, row.standing);
            let shown = shown(state, standing, true);
            let info = ServerInfo { id, address: row.address, zone: row.zone, state: shown, weight: 0 };
            // Whoever was one of them before is taken as it was.
            (id, Member { looked_through: true, ..Member::new(info, state, standing, now) })
        };
        Self {
            members: registered.into_iter().map(member).collect(),
            version,
            suspect_after,
            down_after,
            replicas: Replicas::INHERITED,
        }
    }

    /// So many copies from now on of what has no number of its own.
    pub fn set_replicas(&mut self, replicas: Replicas) {
        self.version += u64::from(self.replicas != replicas);
        self.replicas = replicas;
    }

    /// Copies of what has no number of its own.
    pub fn replicas(&self) -> usize {
        self.replicas.or(REPLICAS)
    }

    /// `true`: the server is new here, or has moved, and has to be registered.
    #[must_use]
    pub fn is_news(&self, id: ServerId, beat: &Heartbeat) -> bool {
        self.members.get(&id).is_none_or(|member| member.info.address != beat.address || member.info.zone != beat.zone)
    }

    pub fn heard(&mut self, id: ServerId, beat: Heartbeat, now: Duration) {
        let old = self.members.get(&id);
        let (standing, left) = old.map_or((Standing::Serving, None), |member| (member.standing, member.left));
        let mut pace = old.map_or(Pace::default(), |member| member.pace).after(&beat.load);
        pace.full_weight = weight(beat.load.free_bytes, old.map_or(0, |member| member.pace.full_weight));
        let weight = pace.weight();
        let mut rhythm = old.map_or(Rhythm::default(), |member| member.rhythm);
        match old {
            Some(old) if old.state == ServerState::Up => rhythm.heard(now.saturating_sub(old.heard)),
            // It has been up before in this life of the metadata server.
            Some(old) if old.boot != BootId(0) => rhythm.returned(now),
            _ => {}
        }
        let state = ServerState::Up;
        let shown = shown(state, standing, rhythm.is_steady(now));
        let info = ServerInfo { id, address: beat.address, zone: beat.zone, state: shown, weight };
        if old.map(|member| &member.info) != Some(&info) {
            self.version += 1;
        }
        let Heartbeat { boot, load, .. } = beat;
        let looked_through = old.is_some_and(|member| member.looked_through);
        let hindered = old.map_or(String::new(), |member| member.hindered.clone());
        let since = old.map_or(now, |member| member.since);
        let before = old.map(Member::appearance);
        let new = Member::new(info, state, standing, now);
        let mut member = Member { left, pace, rhythm, boot, load, looked_through, hindered, since, ..new };
        if before != Some(member.appearance()) {
            member.since = now;
        }
        self.members.insert(id, member);
    }

    /// A server says that it has to stop, and why. What it was is not waited for: it is suspect from now on.
    pub fn failed(&mut self, id: ServerId, why: String, now: Duration) {
        if let Some(member) = self.members.get_mut(&id) {
            self.version += 1;
            member.change(now, |member| {
                member.complaint = Some(why);
                if member.state == ServerState::Up {
                    member.state = ServerState::Suspect;
                }
                member.info.state = shown(member.state, member.standing, member.rhythm.is_steady(now));
            });
        }
    }

    /// What a server has was compared with what it is on record for.
    pub fn looked_through(&mut self, id: ServerId, now: Duration) {
        if let Some(member) = self.members.get_mut(&id) {
            member.change(now, |member| member.looked_through = true);
        }
    }

    /// Compares how long requests take on the servers. Returns those that have become slow, or are no longer: with how many times as
    /// long as on the others they take.
    pub fn compare_paces(&mut self) -> Vec<(ServerId, Option<f64>)> {
        let up = self.members.values().filter(|member| member.state == ServerState::Up);
        let usual = Usual::of(up.map(|member| &member.pace));
        let mut changed = Vec::new();
        for (id, member) in &mut self.members {
            let was_slow = member.pace.is_slow();
            if member.pace.compare(&usual) {
                member.info.weight = member.pace.weight();
                self.version += 1;
            }
            if member.pace.is_slow() != was_slow {
                changed.push((*id, member.pace.is_slow().then(|| member.pace.times(&usual).unwrap_or(1.0))));
            }
        }
        changed
    }

    /// What the operator wants of a server from now on.
    pub fn stand(&mut self, id: ServerId, standing: Standing, now: Duration) {
        self.version += 1;
        if standing == Standing::Removed {
            self.members.remove(&id);
        } else if let Some(member) = self.members.get_mut(&id) {
            member.change(now, |member| {
                if member.standing != standing {
                    (member.left, member.hindered) = (None, String::new());
                }
                member.standing = standing;
                member.info.state = shown(member.state, standing, member.rhythm.is_steady(member.heard));
            });
        }
    }

    pub fn standing(&self, id: ServerId) -> Option<Standing> {
        self.members.get(&id).map(|member| member.standing)
    }

    /// Servers that are to be emptied.
    pub fn leaving(&self) -> Vec<(ServerId, Standing)> {
        let leaving = self.members.values().filter(|member| member.standing.is_leaving());
        leaving.map(|member| (member.info.id, member.standing)).collect()
    }

    /// Servers whose maintenance should be over by `time`.
    pub fn overdue(&self, time: Time) -> Vec<ServerId> {
        let over = |member: &&Member| matches!(member.standing, Standing::Maintenance { until } if until <= time);
        self.members.values().filter(over).map(|member| member.info.id).collect()
    }

    /// How much a server that is to be emptied is still on record for, and why nothing of it can be moved (empty: nothing hinders).
    /// Returns how much it was before, if that is known.
    pub fn note_left(&mut self, id: ServerId, left: u64, hindered: String) -> Option<u64> {
        let member = self.members.get_mut(&id)?;
        member.hindered = hindered;
        member.left.replace(left)
    }

    /// Do copies on this server count: is it up, and not to be emptied?
    pub fn counts(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.state == ServerState::Up && !member.standing.is_leaving())
    }

    /// All of which that is so.
    pub fn counting(&self) -> Vec<ServerId> {
        self.members.keys().copied().filter(|id| self.counts(*id)).collect()
    }

    /// Servers that are up, and are neither to be emptied nor given leave to be away.
    pub fn there(&self) -> BTreeSet<ServerId> {
        let there = |member: &&Member| member.state == ServerState::Up && member.standing == Standing::Serving;
        self.members.values().filter(there).map(|member| member.info.id).collect()
    }

    /// Do new blocks go there?
    pub fn takes_blocks(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.info.state == ServerState::Up)
    }

    /// Do its requests take much longer than those of the others?
    pub fn is_slow(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.pace.is_slow())
    }

    /// Have all servers that are up reported since?
    pub fn all_heard_since(&self, time: Duration) -> bool {
        self.members.values().filter(|member| member.state == ServerState::Up).all(|member| member.heard > time)
    }

    /// Will copies on this server count, now or when it is back?
    pub fn stays(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| !member.standing.is_leaving())
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
            let state = match member.state {
                _ if silent >= self.down_after => ServerState::Down,
                ServerState::Up
                    if silent >= member.rhythm.suspicious_after(self.suspect_after, self.down_after / 2) =>
                {
                    ServerState::Suspect
                }
                state => state,
            };
            if state != member.state {
                member.change(now, |member| {
                    member.state = state;
                    member.looked_through &= state != ServerState::Down;
                    member.info.state = shown(state, member.standing, member.rhythm.is_steady(now));
                });
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
        let servers = self.members.values().map(|member| member.info.clone()).collect();
        ClusterMap { version: self.version, servers, replicas: self.replicas }
    }

    pub fn is_up(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.state == ServerState::Up)
    }

    /// Has it been silent for so long that nobody waits for it any more?
    pub fn is_down(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.state == ServerState::Down)
    }

    /// Was what it has compared with the record since it came up?
    pub fn was_looked_through(&self, id: ServerId) -> bool {
        self.members.get(&id).is_some_and(|member| member.looked_through)
    }

    pub fn up(&self) -> Vec<ServerId> {
        let up = self.members.values().filter(|member| member.state == ServerState::Up);
        up.map(|member| member.info.id).collect()
    }

    /// Those that have been down for `long`, or are down and not to come back. Whoever is in maintenance has leave.
    pub fn down_for(&self, long: Duration, now: Duration) -> Vec<ServerId> {
        let gone = |member: &&Member| {
            let silent = now.saturating_sub(member.heard);
            let long = match member.standing {
                Standing::Maintenance { .. } => return false,
                Standing::Leaving | Standing::Removed => Duration::ZERO,
                Standing::Serving | Standing::Draining => long,
            };
            member.state == ServerState::Down && silent >= self.down_after + long
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

    /// Where copies of `block` that `holders` have can be fetched: those that are up first, those that are down not at all. The ones that
    /// have less to do before the others, and among equals a different one first for each block.
    pub fn sources(&self, block: BlockHash, holders: &[ServerId]) -> Vec<Source> {
        let known = holders.iter().filter_map(|id| self.members.get(id));
        let mut found: Vec<&Member> = known.filter(|member| member.state != ServerState::Down).collect();
        let turn = found.len().max(1);
        found.rotate_left(usize::from(block.0[31]) % turn);
        found.sort_by_key(|member| (member.state != ServerState::Up, member.pace.is_slow(), member.busy()));
        found.into_iter().map(|member| Source { server: member.info.id, address: member.info.address }).collect()
    }

    /// What those who read and write feel.
    pub fn foreground(&self) -> Foreground {
        let up = self.members.values().filter(|member| member.state == ServerState::Up).map(|member| &member.load);
        up.fold(Foreground::default(), |all, load| Foreground {
            servers: all.servers + 1,
            puts: all.puts.and(load.puts, load.put_mean_us),
            gets: all.gets.and(load.gets, load.get_mean_us),
        })
    }

    pub fn status(&self, now: Duration) -> Vec<ServerStatus> {
        let status = |member: &Member| ServerStatus {
            id: member.info.id,
            address: member.info.address,
            zone: member.info.zone.clone(),
            state: member.appearance().0,
            weight: member.info.weight,
            silent_ms: millis(now.saturating_sub(member.heard)),
            boot: member.boot,
            standing: member.standing,
            left: member.left,
            load: member.load,
            since_ms: millis(now.saturating_sub(member.since)),
            reason: member.reason(now),
            hindered: member.hindered.clone(),
        };
        self.members.values().map(status).collect()
    }

    /// What can be stored when each byte is kept on as many distinct servers as the cluster's number says (fewer if there are fewer).
    pub fn space(&self, inodes: u64) -> StatFs {
        let is_usable = |member: &&Member| member.state != ServerState::Down && !member.standing.is_leaving();
        let usable = || self.members.values().filter(is_usable);
        let replicas = self.replicas();
        let storable =
            |bytes: fn(&StorageLoad) -> u64| storable(&usable().map(|m| bytes(&m.load)).collect::<Vec<_>>(), replicas);
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

/// What mounts have to know of both.
fn shown(state: ServerState, standing: Standing, steady: bool) -> ServerState {
    match standing {
        Standing::Maintenance { .. } => ServerState::Maintenance,
        Standing::Draining | Standing::Leaving if state == ServerState::Up => ServerState::Draining,
        // Read from, and not given new blocks if there are others.
        _ if state == ServerState::Up && !steady => ServerState::Suspect,
        _ => state,
    }
}

/// Follows free space, but not its every move: a new map for each percent would help nobody.
fn weight(free_bytes: u64, old: u32) -> u32 {
    let new = u32::try_from((free_bytes / WEIGHT_UNIT).min(WEIGHT_MAX)).unwrap_or(u32::MAX);
    if old > 0 && new > 0 && new.abs_diff(old) <= old / 8 { old } else { new }
}

/// The largest `b` so that `b` bytes can be kept on that many distinct servers: each takes at most `b` of them.
fn storable(bytes: &[u64], replicas: usize) -> u64 {
    let copies = bytes.len().min(replicas);
    if copies < enough_replicas(replicas) {
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
    fn a_server_shows_since_when_and_why_it_is_as_it_is() {
        let mut cluster = cluster();
        let id = ServerId(1);
        let seen = |cluster: &Cluster, now: Duration| {
            let status = &cluster.status(now)[0];
            (status.state, status.since_ms, status.reason.clone())
        };
        cluster.heard(id, beat(1 << 40), SECOND);
        let (state, since_ms, reason) = seen(&cluster, 2 * SECOND);
        assert_eq!((state, since_ms), (ServerState::Joining, 1000));
        assert!(reason.contains("compared with what it is on record for") && cluster.takes_blocks(id), "{reason}");
        cluster.looked_through(id, 2 * SECOND);
        cluster.heard(id, beat(1 << 40), 3 * SECOND);
        assert_eq!(seen(&cluster, 5 * SECOND), (ServerState::Up, 3000, String::new()));
        cluster.tick(6 * SECOND);
        assert_eq!(seen(&cluster, 7 * SECOND), (ServerState::Suspect, 1000, "silent".to_owned()));
        cluster.heard(id, beat(1 << 40), 8 * SECOND);
        assert_eq!(seen(&cluster, 8 * SECOND).0, ServerState::Up, "what it has is known");
        cluster.failed(id, "its disk".to_owned(), 9 * SECOND);
        assert_eq!(seen(&cluster, 9 * SECOND), (ServerState::Suspect, 0, "has stopped: its disk".to_owned()));
        assert!(!cluster.takes_blocks(id));
        cluster.tick(30 * SECOND);
        cluster.heard(id, beat(1 << 40), 31 * SECOND);
        assert!(
            seen(&cluster, 31 * SECOND).0 == ServerState::Joining && !cluster.was_looked_through(id),
            "it was down"
        );
        cluster.looked_through(id, 31 * SECOND);
        cluster.stand(id, Standing::Draining, 32 * SECOND);
        assert_eq!(seen(&cluster, 34 * SECOND), (ServerState::Up, 2000, "the operator wants it so".to_owned()));
        cluster.note_left(id, 5, "nobody takes them".to_owned());
        let hindered = |cluster: &Cluster| cluster.status(34 * SECOND)[0].hindered.clone();
        cluster.stand(id, Standing::Draining, 33 * SECOND);
        assert_eq!(hindered(&cluster), "nobody takes them", "the same order again changes nothing");
        cluster.stand(id, Standing::Serving, 33 * SECOND);
        assert_eq!(hindered(&cluster), "");
    }

    #[test]
    fn copies_are_fetched_from_whoever_has_least_to_do_and_from_each_in_turn() {
        let mut cluster = cluster();
        let busy = |disk_busy_percent| {
            let load = StorageLoad { disk_busy_percent, ..beat(1 << 40).load };
            Heartbeat { load, ..beat(1 << 40) }
        };
        let holders = [ServerId(1), ServerId(2), ServerId(3)];
        let firsts = |cluster: &Cluster| {
            let block = |n: u8| BlockHash([n; 32]);
            (0..30).map(|n| cluster.sources(block(n), &holders)[0].server.0).collect::<Vec<_>>()
        };
        holders.iter().for_each(|id| cluster.heard(*id, busy(10), SECOND));
        assert!((1..=3).all(|id| firsts(&cluster).iter().filter(|first| **first == id).count() == 10));
        cluster.heard(ServerId(2), busy(90), SECOND);
        assert!(!firsts(&cluster).contains(&2), "it is busy");
    }

    #[test]
    fn a_standing_is_seen_by_mounts_and_outlives_silence() {
        let mut cluster = cluster();
        (1..=3).for_each(|id| cluster.heard(ServerId(id), beat(1 << 40), SECOND));
        let shown = |cluster: &Cluster| cluster.map().servers.iter().map(|info| info.state).collect::<Vec<_>>();
        let until = Time { secs: 100, nanos: 0 };
        cluster.stand(ServerId(1), Standing::Draining, SECOND);
        cluster.stand(ServerId(2), Standing::Maintenance { until }, SECOND);
        assert_eq!(shown(&cluster), [ServerState::Draining, ServerState::Maintenance, ServerState::Up]);
        assert!(cluster.is_up(ServerId(1)) && !cluster.counts(ServerId(1)) && cluster.counts(ServerId(2)));
        cluster.heard(ServerId(1), beat(1 << 40), 2 * SECOND);
        assert_eq!(shown(&cluster)[0], ServerState::Draining);
        cluster.tick(1000 * SECOND);
        assert_eq!(shown(&cluster), [ServerState::Down, ServerState::Maintenance, ServerState::Down]);
        assert_eq!(cluster.down_for(SECOND, 1000 * SECOND), [ServerId(1), ServerId(3)], "2 has leave");
        assert_eq!(cluster.overdue(Time { secs: 99, nanos: 0 }), []);
        assert_eq!(cluster.overdue(until), [ServerId(2)]);
        cluster.stand(ServerId(2), Standing::Removed, SECOND);
        assert_eq!(cluster.map().servers.len(), 2);
    }

    #[test]
    fn a_server_that_comes_and_goes_gets_no_new_blocks_for_a_while() {
        let mut cluster = cluster();
        let mut now = SECOND;
        cluster.heard(ServerId(1), beat(1 << 40), now);
        let mut come_back = |cluster: &mut Cluster| {
            now += 3 * SECOND;
            assert_eq!(cluster.tick(now), [(ServerId(1), ServerState::Suspect)]);
            cluster.heard(ServerId(1), beat(1 << 40), now);
            (cluster.is_up(ServerId(1)), cluster.takes_blocks(ServerId(1)))
        };
        assert_eq!(come_back(&mut cluster), (true, true), "once is nothing");
        assert_eq!(come_back(&mut cluster), (true, false));
        assert_eq!(come_back(&mut cluster), (true, false));
        (1..=3).for_each(|secs| cluster.heard(ServerId(1), beat(1 << 40), now + secs * SECOND));
        assert!(cluster.takes_blocks(ServerId(1)), "it has stayed");
    }

    #[test]
    fn a_slow_server_gets_fewer_blocks_and_its_share_again_when_it_is_as_fast_as_the_others() {
        let mut cluster = cluster();
        let busy = |mean_us| {
            let load = StorageLoad { puts: 50, put_mean_us: mean_us, ..beat(1 << 40).load };
            Heartbeat { load, ..beat(1 << 40) }
        };
        let run = |cluster: &mut Cluster, slow_us: u32| {
            let mut told = Vec::new();
            for _ in 0..60 {
                (1..=4).for_each(|id| cluster.heard(ServerId(id), busy(if id == 4 { slow_us } else { 1000 }), SECOND));
                told.extend(cluster.compare_paces());
            }
            told
        };
        let weights = |cluster: &Cluster| cluster.map().servers.iter().map(|info| info.weight).collect::<Vec<_>>();
        assert_eq!(run(&mut cluster, 1500), [], "a little slower");
        let full = weights(&cluster)[0];
        assert_eq!(weights(&cluster), [full; 4]);
        let told = run(&mut cluster, 20_000);
        assert!(matches!(told.as_slice(), [(ServerId(4), Some(5.0..=20.0))]), "{told:?}");
        assert!(weights(&cluster)[3] <= full / 4 && weights(&cluster)[3] > 0, "{:?}", weights(&cluster));
        let version = cluster.version();
        assert_eq!(run(&mut cluster, 21_000), []);
        assert_eq!(cluster.version(), version, "no new map for a little");
        assert_eq!(run(&mut cluster, 1000), [(ServerId(4), None)]);
        assert_eq!(weights(&cluster), [full; 4]);
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
            assert_eq!(storable(&bytes, REPLICAS), expected, "{bytes:?}");
        }
        assert_eq!((storable(&[10], 1), storable(&[10, 4], 1)), (10, 14), "one copy each");
        assert_eq!((storable(&[10; 5], 5), storable(&[10; 4], 5), storable(&[10], 5)), (10, 10, 0));
    }
}
