//! UDP sockets: with buffers large enough for bulk transfers, and a way to learn that nobody listens.
#![allow(unsafe_code, reason = "SO_RCVBUFFORCE and SO_SNDBUFFORCE have no safe wrapper")]

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    pin::Pin,
    sync::{Arc, Once},
    task::{Context, Poll},
    time::Duration,
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::timeout;

/// Datagrams, each of which may be many that the kernel has joined, that are taken from the kernel at once. quinn's 32 would be read
/// into two mebibytes that lie far apart: by the time that they are decrypted, the processor's cache has lost them.
const RECEIVED_AT_ONCE: usize = 4;
/// Bytes of a UDP datagram at most, and so of what the kernel joins.
const UDP_DATAGRAM_MAX: usize = 65_535;

/// How long to wait for an ICMP message before the next datagram, which may meet a process that died meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// A socket that is read in smaller bites than quinn's.
#[derive(Debug)]
pub(super) struct SmallBites {
    pub(super) inner: Arc<dyn AsyncUdpSocket>,
    /// Bytes of the largest datagram.
    pub(super) datagram_max: usize,
}

impl AsyncUdpSocket for SmallBites {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let count = buffers.len().min(RECEIVED_AT_ONCE);
        self.inner.poll_recv(context, &mut buffers[..count], meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    /// quinn makes its buffers from this. The kernel joins no more bytes than fit into one datagram, however many segments that are.
    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(UDP_DATAGRAM_MAX.div_ceil(self.datagram_max))
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Binds `address`; `[::]` also takes IPv4.
pub(super) fn bind(address: SocketAddr, buffer_bytes: usize) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    enlarge_buffers(&socket, buffer_bytes)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// The default of 208 KiB loses thousands of packets a second in bulk transfers.
fn enlarge_buffers(socket: &Socket, bytes: usize) -> io::Result<()> {
    if !force_buffer(socket, libc::SO_RCVBUFFORCE, bytes) {
        socket.set_recv_buffer_size(bytes)?;
    }
    if !force_buffer(socket, libc::SO_SNDBUFFORCE, bytes) {
        socket.set_send_buffer_size(bytes)?;
    }
    warn_if_small(socket.recv_buffer_size()?, bytes);
    Ok(())
}

/// Past the system's limit; only root may.
fn force_buffer(socket: &Socket, option: libc::c_int, bytes: usize) -> bool {
    let Ok(value) = libc::c_int::try_from(bytes) else { return false };
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and `value` outlives the call,
    // which reads the given four bytes of it.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), SIZE_OF_INT)
    };
    result == 0
}

#[allow(clippy::cast_possible_truncation, reason = "four")]
const SIZE_OF_INT: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

fn warn_if_small(got: usize, wanted: usize) {
    static WARNED: Once = Once::new();
    // The kernel reports twice what it grants.
    if got / 2 < wanted / 2 {
        WARNED.call_once(|| {
            tracing::warn!(
                got = got / 2,
                wanted,
                "the system grants only a small UDP receive buffer, which loses packets under load; \
                 run: sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"
            );
        });
    }
}

/// Ends when the machine at `address` says that nobody listens there, or that there is no way to it; never otherwise.
///
/// QUIC cannot tell a dead process from a slow one, but the kernel of a living machine can: it answers
/// a datagram to a closed port with an ICMP message, which a connected socket reports. The datagram, one zero
/// byte, is no QUIC packet and is ignored by whoever does listen.
pub(super) async fn refused(address: SocketAddr) -> String {
    match ask(address).await {
        Ok(()) => std::future::pending().await,
        Err(error) if is_refusal(&error) => error.to_string(),
        Err(error) => {
            tracing::debug!(%address, %error, "whether somebody listens cannot be found out");
            std::future::pending().await
        }
    }
}

async fn ask(address: SocketAddr) -> io::Result<()> {
    let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = tokio::net::UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(address).await?;
    loop {
        socket.send(&[0]).await?;
        // Nobody has a reason to answer; who does, listens.
        match timeout(ASK_AGAIN, socket.recv(&mut [0; 1])).await {
            Ok(answer) => return answer.map(drop),
            Err(_) => continue,
        }
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
    )
}
