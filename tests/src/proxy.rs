//! A wire that can be cut: forwards datagrams to one address, until told not to.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::sys;

/// Peers of one proxy: more would be a leak in the test.
const PEERS_MAX: usize = 64;
/// Bytes of datagrams that may wait in a socket.
const SOCKET_BUFFER: libc::c_int = 8 << 20;

/// Listens on `address`; what peers send there reaches `target`, and the answers come back.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    target: SocketAddr,
    /// What peers send is lost.
    is_deaf: AtomicBool,
    /// What the target sends is lost.
    is_mute: AtomicBool,
    is_over: AtomicBool,
}

impl Proxy {
    pub fn start(address: SocketAddr, target: SocketAddr) -> Self {
        let socket = socket(address).unwrap_or_else(|error| panic!("bind the proxy to {address}: {error}"));
        let shared = Arc::new(Shared { socket, target, is_deaf: off(), is_mute: off(), is_over: off() });
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || forward(&shared)
        });
        Self { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing passes, either way.
    pub fn cut(&self) {
        self.shared.is_deaf.store(true, Ordering::SeqCst);
        self.cut_answers();
    }

    /// From now on the target hears its peers, and they do not hear it.
    pub fn cut_answers(&self) {
        self.shared.is_mute.store(true, Ordering::SeqCst);
    }

    pub fn mend(&self) {
        self.shared.is_deaf.store(false, Ordering::SeqCst);
        self.shared.is_mute.store(false, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
    }
}

fn off() -> AtomicBool {
    AtomicBool::new(false)
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    sys::grow_socket_buffers(&socket, SOCKET_BUFFER);
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

impl Shared {
    fn hears(&self) -> bool {
        !self.is_deaf.load(Ordering::SeqCst)
    }

    fn answers(&self) -> bool {
        !self.is_mute.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }
}

/// Each peer gets a socket of its own towards the target, which so can tell them apart.
fn forward(shared: &Arc<Shared>) {
    let mut peers: BTreeMap<SocketAddr, Peer> = BTreeMap::new();
    let mut datagram = vec![0; 1 << 16];
    while !shared.is_over() {
        let Ok((length, from)) = shared.socket.recv_from(&mut datagram) else { continue };
        // Whoever was restarted comes from another port: the old one is not heard again.
        if peers.len() >= PEERS_MAX
            && !peers.contains_key(&from)
            && let Some(silent) = peers.iter().min_by_key(|(_, peer)| peer.heard).map(|(address, _)| *address)
        {
            peers.remove(&silent);
        }
        let peer = peers.entry(from).or_insert_with(|| connect(shared, from));
        peer.heard = Instant::now();
        if shared.hears() {
            // A datagram that cannot be sent is a datagram that is lost: the network's good right.
            peer.upstream.send(&datagram[..length]).ok();
        }
    }
}

struct Peer {
    upstream: UdpSocket,
    heard: Instant,
    /// The thread that brings answers back ends with it.
    _life: Arc<()>,
}

fn connect(shared: &Arc<Shared>, peer: SocketAddr) -> Peer {
    let upstream = socket(([127, 0, 0, 1], 0).into()).expect("a free port");
    upstream.connect(shared.target).expect("the target is an address");
    let (answers, shared) = (upstream.try_clone().expect("a socket can be duplicated"), Arc::clone(shared));
    let life = Arc::new(());
    let lives = Arc::downgrade(&life);
    thread::spawn(move || {
        let mut datagram = vec![0; 1 << 16];
        while !shared.is_over() && lives.strong_count() > 0 {
            if let Ok(length) = answers.recv(&mut datagram)
                && shared.answers()
            {
                shared.socket.send_to(&datagram[..length], peer).ok();
            }
        }
    });
    Peer { upstream, heard: Instant::now(), _life: life }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_pass_both_ways_until_the_wire_is_cut() {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let (server, client) = (socket(local).unwrap(), socket(local).unwrap());
        let free = UdpSocket::bind(local).unwrap().local_addr().unwrap();
        let proxy = Proxy::start(free, server.local_addr().unwrap());
        let mut bytes = [0; 8];

        client.send_to(b"ping", proxy.address()).unwrap();
        let (length, peer) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"ping");
        server.send_to(b"pong", peer).unwrap();
        assert_eq!(client.recv(&mut bytes).unwrap(), 4);

        proxy.cut();
        client.send_to(b"lost", proxy.address()).unwrap();
        assert!(server.recv(&mut bytes).is_err());
        proxy.mend();
        client.send_to(b"back", proxy.address()).unwrap();
        assert_eq!(server.recv(&mut bytes).unwrap(), 4);

        proxy.cut_answers();
        client.send_to(b"ask", proxy.address()).unwrap();
        assert_eq!(server.recv(&mut bytes).unwrap(), 3);
        server.send_to(b"unheard", peer).unwrap();
        assert!(client.recv(&mut bytes).is_err());
    }
}
