//! Which storage servers run on this machine: what they send crosses no network.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    io,
    net::{IpAddr, UdpSocket},
};

use holdfast_common::{ServerId, work};
use parking_lot::Mutex;

#[derive(Debug, Default)]
pub struct Near {
    /// So that not every mount of a machine with several servers has the same favourite.
    salt: RandomState,
    known: Mutex<HashMap<IpAddr, bool>>,
}

impl Near {
    /// Of the servers on this machine always the same one: what is asked of it together it answers together, for less than
    /// several that share its processors.
    pub fn favourite(&self, servers: impl Iterator<Item = (ServerId, IpAddr)>) -> Option<ServerId> {
        let here = servers.filter(|(_, address)| self.is_here(*address)).map(|(server, _)| server);
        here.min_by_key(|server| self.salt.hash_one(server))
    }

    pub fn is_here(&self, address: IpAddr) -> bool {
        let mut known = self.known.lock();
        known.get(&address).copied().unwrap_or_else(|| {
            let found = is_own(address);
            found.map(|found| known.insert(address, found));
            found.unwrap_or(false)
        })
    }
}

/// A machine binds sockets only to addresses of its own, unless it is told otherwise (`net.ipv4.ip_nonlocal_bind`): then all servers seem to be
/// here. `None` if there is no telling now.
fn is_own(address: IpAddr) -> Option<bool> {
    if work::is_simulated() {
        return Some(false);
    }
    match UdpSocket::bind((address, 0)) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Some(false),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For documentation (RFC 5737): no machine has it.
    const ELSEWHERE: [u8; 4] = [192, 0, 2, 7];

    #[test]
    fn the_favourite_is_on_this_machine_and_stays_the_same() {
        let near = Near::default();
        let servers = [(1, ELSEWHERE), (2, [127, 0, 0, 1]), (3, [127, 3, 2, 1])]
            .map(|(id, address)| (ServerId(id), IpAddr::from(address)));
        let first = near.favourite(servers.into_iter());
        assert!(first.is_some_and(|server| server != ServerId(1)));
        assert_eq!(near.favourite(servers.into_iter().rev()), first);
        assert_eq!(near.favourite(servers.into_iter().take(1)), None);
        let others: Vec<_> = servers.into_iter().filter(|(server, _)| Some(*server) != first).collect();
        assert!(near.favourite(others.into_iter()).is_some_and(|server| Some(server) != first));
    }

    #[test]
    fn mounts_differ_in_their_favourites() {
        let servers = [1, 2].map(|id| (ServerId(id), IpAddr::from([127, 0, 0, 1])));
        let ones = (0..200).filter(|_| Near::default().favourite(servers.into_iter()) == Some(ServerId(1))).count();
        assert!((50..150).contains(&ones), "{ones} of 200");
    }
}
