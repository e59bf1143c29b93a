//! Mounts as they are now: when last heard, and what they hold open. Pure: time comes in.
//!
//! This is memory, not state: after a restart the mounts say again what they hold open, and until all have
//! (or have expired) nothing is reclaimed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use holdfast_common::{
    Ino, Position, Refusal, SessionId, limits::HEADER_SIZE_MAX, net::identity::NodeName, wire::meta::MountStatus,
};

use super::{cluster::millis, state::rows::SessionRow};

/// Sessions at one time.
const SESSIONS_MAX: usize = 65_536;
/// Inodes that one session may hold open, and all together: bounds this server's memory.
pub const OPENS_MAX: usize = 1 << 18;
const _: () = assert!(OPENS_MAX * 8 + (64 << 10) <= HEADER_SIZE_MAX);
const OPENS_TOTAL_MAX: usize = 1 << 22;

#[derive(Debug)]
struct Mount {
    node: NodeName,
    host: String,
    mountpoint: String,
    heard: Duration,
    dirty_bytes: u64,
    repairs: u64,
    opens: BTreeSet<Ino>,
    /// It has said what it holds open in this life of the server.
    confirmed: bool,
    /// Its programs have been told of changes that it has yet to ask for, from before this life of the server.
    is_behind: bool,
    /// It has to say again what it had done after this.
    owes: Option<Position>,
    /// Where in the order of all changes it began; 0: in an earlier life of the server.
    began: Position,
}

#[derive(Debug, Default)]
pub struct Sessions {
    mounts: BTreeMap<SessionId, Mount>,
    /// By how many sessions an inode is held open.
    holders: BTreeMap<Ino, u32>,
    /// Inodes held open, once for each session.
    opens: usize,
}

impl Sessions {
    /// Those that were open when the server stopped have one timeout to say so again.
    pub fn restored(rows: Vec<(SessionId, SessionRow)>, now: Duration) -> Self {
        let mut sessions = Self::default();
        for (id, row) in rows {
            sessions.insert(id, row.node, row.host, row.mountpoint, now, false);
        }
        sessions
    }

    pub fn opened(&mut self, id: SessionId, node: NodeName, host: String, mountpoint: String, now: Duration) {
        match self.mounts.get_mut(&id) {
            Some(mount) => mount.heard = now,
            None => self.insert(id, node, host, mountpoint, now, true),
        }
    }

    fn insert(
        &mut self,
        id: SessionId,
        node: NodeName,
        host: String,
        mountpoint: String,
        heard: Duration,
        confirmed: bool,
    ) {
        let opens = BTreeSet::new();
        let (is_behind, owes, began) = (false, None, Position(0));
        let (dirty_bytes, repairs) = (0, 0);
        let mount =
            Mount { node, host, mountpoint, heard, dirty_bytes, repairs, opens, confirmed, is_behind, owes, began };
        self.mounts.insert(id, mount);
    }

    /// A session belongs to the certificate that opened it.
    pub fn check(&self, id: SessionId, node: NodeName) -> Result<(), Refusal> {
        match self.mounts.get(&id) {
            None => Err(Refusal::SessionExpired),
            Some(mount) if mount.node != node => Err(Refusal::WrongRole),
            Some(_) => Ok(()),
        }
    }

    pub fn renew(&mut self, id: SessionId, dirty_bytes: u64, repairs: u64, now: Duration) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            (mount.heard, mount.dirty_bytes, mount.repairs) = (now, dirty_bytes, repairs);
        }
    }

    /// The mount is alive.
    pub fn heard(&mut self, id: SessionId, now: Duration) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            mount.heard = now;
        }
    }

    /// After a restart of the server: all that the session holds open.
    pub fn reopen(&mut self, id: SessionId, inos: &[Ino], is_behind: bool, now: Duration) -> Result<(), Refusal> {
        self.hold(id, inos)?;
        if let Some(mount) = self.mounts.get_mut(&id) {
            (mount.heard, mount.confirmed, mount.is_behind) = (now, true, is_behind);
        }
        Ok(())
    }

    pub fn hold(&mut self, id: SessionId, inos: &[Ino]) -> Result<(), Refusal> {
        let mount = self.mounts.get(&id).ok_or(Refusal::SessionExpired)?;
        let new: BTreeSet<&Ino> = inos.iter().filter(|ino| !mount.opens.contains(ino)).collect();
        self.admit_opens(id, new.len())?;
        inos.iter().try_for_each(|ino| self.hold_made(id, *ino))
    }

    /// May the session hold `more` inodes open?
    pub fn admit_opens(&self, id: SessionId, more: usize) -> Result<(), Refusal> {
        let mount = self.mounts.get(&id).ok_or(Refusal::SessionExpired)?;
        let fits = mount.opens.len() + more <= OPENS_MAX && self.opens + more <= OPENS_TOTAL_MAX;
        if fits { Ok(()) } else { Err(Refusal::Unavailable) }
    }

    /// Holds a file open that was made so: whether there is room was asked before.
    pub fn hold_made(&mut self, id: SessionId, ino: Ino) -> Result<(), Refusal> {
        let mount = self.mounts.get_mut(&id).ok_or(Refusal::SessionExpired)?;
        if mount.opens.insert(ino) {
            self.opens += 1;
            *self.holders.entry(ino).or_default() += 1;
        }
        Ok(())
    }

    pub fn is_full(&self) -> bool {
        self.mounts.len() >= SESSIONS_MAX
    }

    pub fn release(&mut self, id: SessionId, inos: &[Ino]) {
        let Some(mount) = self.mounts.get_mut(&id) else { return };
        for ino in inos {
            if mount.opens.remove(ino) {
                self.opens -= 1;
                let_go(&mut self.holders, *ino);
            }
        }
    }

    /// Forgets a session that has ended: what it held open is released.
    pub fn end(&mut self, id: SessionId) {
        if let Some(mount) = self.mounts.remove(&id) {
            self.opens -= mount.opens.len();
            mount.opens.into_iter().for_each(|ino| let_go(&mut self.holders, ino));
        }
    }

    /// The session was opened by the entry at `position`.
    pub fn begin(&mut self, id: SessionId, position: Position) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            mount.began = position;
        }
    }

    /// The session cannot have anything in its caches from before this.
    pub fn began(&self, id: SessionId) -> Position {
        self.mounts.get(&id).map_or(Position(0), |mount| mount.began)
    }

    pub fn owe(&mut self, id: SessionId, after: Position) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            mount.owes = Some(after);
        }
    }

    pub fn owes(&self, id: SessionId) -> Option<Position> {
        self.mounts.get(&id)?.owes
    }

    /// Is there a mount that may still say again what it had done?
    pub fn is_anything_owed(&self) -> bool {
        self.mounts.values().any(|mount| mount.owes.is_some())
    }

    /// The mount has said all that it had done.
    pub fn settle(&mut self, id: SessionId) {
        if let Some(mount) = self.mounts.get_mut(&id) {
            mount.owes = None;
        }
    }

    /// Nobody could be heard while everybody waited.
    pub fn hear_all(&mut self, now: Duration) {
        self.mounts.values_mut().for_each(|mount| mount.heard = now);
    }

    pub fn exists(&self, id: SessionId) -> bool {
        self.mounts.contains_key(&id)
    }

    /// Has the mount said what it holds open?
    pub fn is_confirmed(&self, id: SessionId) -> bool {
        self.mounts.get(&id).is_some_and(|mount| mount.confirmed)
    }

    pub fn holds(&self, id: SessionId, ino: Ino) -> bool {
        self.mounts.get(&id).is_some_and(|mount| mount.opens.contains(&ino))
    }

    pub fn is_open(&self, ino: Ino) -> bool {
        self.holders.contains_key(&ino)
    }

    /// Has every mount said what it holds open?
    pub fn all_confirmed(&self) -> bool {
        self.mounts.values().all(|mount| mount.confirmed)
    }

    /// Have all but this one said that they rely on nothing of an earlier life of the server any more?
    pub fn rely_on_nothing(&self, except: SessionId) -> bool {
        // Who is behind itself does not wait for others that are: it would be waited for.
        let is_behind = self.mounts.get(&except).is_some_and(|mount| mount.is_behind);
        let relies = |mount: &Mount| !mount.confirmed || mount.is_behind && !is_behind;
        !self.mounts.iter().any(|(id, mount)| *id != except && relies(mount))
    }

    /// Shortens everybody's silence by a time in which nobody could be heard.
    pub fn forgive(&mut self, missed: Duration, now: Duration) {
        self.mounts.values_mut().for_each(|mount| mount.heard = now.min(mount.heard + missed));
    }

    pub fn is_expired(&self, id: SessionId, now: Duration, timeout: Duration) -> bool {
        self.mounts.get(&id).is_some_and(|mount| now.saturating_sub(mount.heard) >= timeout)
    }

    pub fn expired(&self, now: Duration, timeout: Duration) -> Vec<SessionId> {
        self.mounts.keys().copied().filter(|id| self.is_expired(*id, now, timeout)).collect()
    }

    pub fn status(&self, now: Duration) -> Vec<MountStatus> {
        let status = |(id, mount): (&SessionId, &Mount)| MountStatus {
            session: *id,
            host: mount.host.clone(),
            mountpoint: mount.mountpoint.clone(),
            silent_ms: millis(now.saturating_sub(mount.heard)),
            open_files: mount.opens.len() as u64,
            dirty_bytes: mount.dirty_bytes,
            repairs: mount.repairs,
        };
        self.mounts.iter().map(status).collect()
    }
}

fn let_go(holders: &mut BTreeMap<Ino, u32>, ino: Ino) {
    if let Some(count) = holders.get_mut(&ino) {
        *count -= 1;
        if *count == 0 {
            holders.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::{Sequence, net::identity::Role};

    use super::*;

    const NODE: NodeName = NodeName { role: Role::Client, id: 4 };

    fn row(node: NodeName) -> SessionRow {
        let (host, mountpoint) = (String::new(), String::new());
        SessionRow { node, instance: [0; 16], host, mountpoint, answered_below: Sequence(1) }
    }

    #[test]
    fn an_inode_stays_open_until_the_last_mount_lets_it_go() {
        let mut sessions = Sessions::default();
        for id in [1, 2] {
            sessions.opened(SessionId(id), NODE, String::new(), String::new(), Duration::ZERO);
            sessions.hold(SessionId(id), &[Ino(7), Ino(7)]).unwrap();
        }
        sessions.hold(SessionId(1), &[Ino(7)]).unwrap();
        sessions.release(SessionId(1), &[Ino(7), Ino(9)]);
        assert!(sessions.is_open(Ino(7)) && !sessions.holds(SessionId(1), Ino(7)));
        sessions.end(SessionId(2));
        assert!(!sessions.is_open(Ino(7)));
        assert_eq!(sessions.hold(SessionId(2), &[Ino(7)]), Err(Refusal::SessionExpired));
    }

    #[test]
    fn a_restart_waits_for_every_mount_or_its_expiry() {
        let timeout = Duration::from_secs(60);
        let rows = vec![(SessionId(1), row(NODE)), (SessionId(2), row(NODE))];
        let mut sessions = Sessions::restored(rows, Duration::ZERO);
        assert!(!sessions.all_confirmed());
        sessions.reopen(SessionId(1), &[Ino(3)], true, Duration::from_secs(5)).unwrap();
        assert!(!sessions.all_confirmed());
        assert_eq!(sessions.expired(Duration::from_secs(60), timeout), [SessionId(2)]);
        sessions.end(SessionId(2));
        assert!(sessions.all_confirmed() && sessions.is_open(Ino(3)));
        assert!(sessions.rely_on_nothing(SessionId(1)) && !sessions.rely_on_nothing(SessionId(0)), "it is behind");
        sessions.reopen(SessionId(1), &[], false, Duration::from_secs(6)).unwrap();
        assert!(sessions.rely_on_nothing(SessionId(0)));
    }

    #[test]
    fn what_is_held_open_is_bounded_and_given_back() {
        let mut sessions = Sessions::default();
        let inos: Vec<Ino> = (0..OPENS_MAX as u64).map(Ino).collect();
        let full = (OPENS_TOTAL_MAX / OPENS_MAX) as u64;
        for id in 0..=full {
            sessions.opened(SessionId(id), NODE, String::new(), String::new(), Duration::ZERO);
        }
        for id in 0..full {
            sessions.hold(SessionId(id), &inos).unwrap();
            sessions.hold(SessionId(id), &inos).expect("it holds them already");
            assert_eq!(sessions.hold(SessionId(id), &[Ino(1 << 40)]), Err(Refusal::Unavailable), "{id}");
        }
        assert_eq!(sessions.hold(SessionId(full), &[Ino(1)]), Err(Refusal::Unavailable), "all together");
        sessions.release(SessionId(0), &[Ino(1)]);
        sessions.hold(SessionId(full), &[Ino(1)]).unwrap();
        sessions.end(SessionId(1));
        sessions.hold(SessionId(full), &inos[..OPENS_MAX / 2]).unwrap();
    }

    #[test]
    fn a_session_belongs_to_its_certificate() {
        let sessions = Sessions::restored(vec![(SessionId(1), row(NODE))], Duration::ZERO);
        assert_eq!(sessions.check(SessionId(1), NODE), Ok(()));
        assert_eq!(sessions.check(SessionId(1), NodeName { id: 5, ..NODE }), Err(Refusal::WrongRole));
        assert_eq!(sessions.check(SessionId(9), NODE), Err(Refusal::SessionExpired));
    }
}
