//! QUIC: one endpoint on one UDP socket, with which a process serves and calls.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use quinn::{
    AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, Runtime,
    TokioRuntime, TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::{
        CryptoError, HmacKey,
        rustls::{QuicClientConfig, QuicServerConfig},
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    BoxFuture, CallError, Endpoint, Frame, Peers, Serve,
    call::Caller,
    enrol::Enrol,
    serve::Server,
    socket,
    tls::{Credentials, TlsError},
};
use crate::clock::{Clock, SystemClock};

/// Bytes of the largest datagram to another machine. Above 6550, ten segments of one send exceed 64 KiB: sendmsg fails and quinn does not tell.
const UDP_PAYLOAD_REMOTE: u16 = 6500;
/// Bytes of a datagram to a peer on this machine: with IPv6 and UDP headers, no more than the loopback's 65,536. Each is sent alone.
const UDP_PAYLOAD_LOCAL: u16 = 65_000;
/// Bytes of a datagram before discovery: fits Ethernet's 1500 with IPv6 and UDP headers.
const UDP_PAYLOAD_INITIAL: u16 = 1452;
/// Bytes that may be under way before anything has been acknowledged. quinn's 12,000 are not even two of our largest
/// datagrams: the second one of an answer would wait for the peer's delayed acknowledgement, 25 ms.
const WINDOW_INITIAL_REMOTE: u64 = 64 << 10;
const WINDOW_INITIAL_LOCAL: u64 = 1 << 20;
const _: () = assert!(WINDOW_INITIAL_REMOTE >= 10 * UDP_PAYLOAD_REMOTE as u64);
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const STREAMS_PER_CONNECTION: u32 = 1024;
const CONNECTION_ID_SIZE: usize = 8;
/// Connections whose first packet waits to be looked at.
const INCOMING_MAX: usize = 1024;

/// Connection-level code of a normal end.
pub(super) const CODE_CLOSING: VarInt = VarInt::from_u32(0);
/// Connection-level code: the certificate does not allow this conversation.
pub(super) const CODE_UNTRUSTED: VarInt = VarInt::from_u32(2);
/// Connection-level code: too many connections.
pub(super) const CODE_BUSY: VarInt = VarInt::from_u32(3);

/// How an endpoint behaves. The default is right for daemons and mounts.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// A connection that is not made by then is given up.
    pub connect_timeout: Duration,
    /// A peer that has sent nothing for so long is taken for dead.
    pub idle_timeout: Duration,
    /// How often a silent connection says that it is alive. Less than half of `idle_timeout`.
    pub keep_alive: Duration,
    /// Bytes of the socket's buffers, each.
    pub socket_buffer_bytes: usize,
    /// Requests served at once, over all connections; more wait unread.
    pub requests_max: usize,
    /// Bytes of requests in memory at once, over all connections; more wait unread.
    pub request_bytes_max: usize,
    /// Connections served at once.
    pub connections_max: usize,
    /// Ask the peer's kernel whether anybody listens, to notice a dead process at once.
    pub ask_kernel: bool,
    /// For simulation: makes the endpoint's randomness repeatable.
    pub rng_seed: Option<[u8; 32]>,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(2),
            socket_buffer_bytes: 8 << 20,
            requests_max: 1024,
            request_bytes_max: 256 << 20,
            connections_max: 8192,
            ask_kernel: true,
            rng_seed: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("the address {0} is in use by another process")]
    InUse(SocketAddr),
    #[error("the address {0} does not belong to this machine")]
    NotHere(SocketAddr),
    #[error("a UDP socket on {address} cannot be opened")]
    Socket { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl BindError {
    fn new(address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(address),
            io::ErrorKind::AddrNotAvailable => Self::NotHere(address),
            _ => Self::Socket { address, source },
        }
    }
}

/// One process on the network: serves, and calls others, under one certificate.
#[derive(Debug)]
pub struct Node {
    endpoint: quinn::Endpoint,
    credentials: Credentials,
    options: NetOptions,
    caller: Arc<Caller>,
}

impl Node {
    /// Opens a UDP socket on `listen` (port 0: any free one). Inside a tokio runtime.
    pub fn bind(listen: SocketAddr, credentials: Credentials, options: NetOptions) -> Result<Arc<Self>, BindError> {
        let bound = |source| BindError::new(listen, source);
        let socket = socket::bind(listen, options.socket_buffer_bytes).map_err(bound)?;
        let runtime = Arc::new(TokioRuntime);
        let socket = runtime.wrap_udp_socket(socket).map_err(bound)?;
        if let Err(error) = credentials.check(SystemClock::default().now()) {
            tracing::warn!(node = %credentials.node, %error, "peers will refuse this node's certificate; enrol it again");
        }
        Self::on_socket(socket, runtime, credentials, options)
    }

    /// On any socket: the seam for simulated networks.
    pub fn on_socket(
        socket: Arc<dyn AsyncUdpSocket>,
        runtime: Arc<dyn Runtime>,
        credentials: Credentials,
        options: NetOptions,
    ) -> Result<Arc<Self>, BindError> {
        let endpoint = new_endpoint(socket, runtime, Some(&credentials), &options)?;
        let caller = Arc::new(Caller::new(endpoint.clone(), &credentials, &options)?);
        Ok(Arc::new(Self { endpoint, credentials, options, caller }))
    }

    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// The address that the socket is bound to, with its real port.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Answers peers until [`Node::close`]. A caller that goes away does not stop a request that has begun: `service` runs
    /// it to its end. With `enrol`, those who have no certificate yet may enrol, and nothing else.
    pub fn serve(
        &self,
        service: Arc<dyn Serve>,
        enrol: Option<Arc<dyn Enrol>>,
    ) -> Result<impl Future<Output = ()> + Send + 'static, TlsError> {
        let server = Server::new(self.endpoint.clone(), &self.credentials, &self.options, service, enrol)?;
        Ok(server.run())
    }

    /// Ends all connections; every call and `serve` end.
    pub fn close(&self) {
        self.endpoint.close(CODE_CLOSING, b"the process is stopping");
    }

    /// After [`Node::close`]: waits until peers have been told.
    pub async fn closed(&self) {
        self.endpoint.wait_idle().await;
    }
}

impl Peers for Node {
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(self.caller.call(to, request, deadline))
    }
}

/// The one place where a quinn endpoint is made. Without credentials it can only call.
pub(super) fn new_endpoint(
    socket: Arc<dyn AsyncUdpSocket>,
    runtime: Arc<dyn Runtime>,
    credentials: Option<&Credentials>,
    options: &NetOptions,
) -> Result<quinn::Endpoint, BindError> {
    let address = socket.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let config = endpoint_config(credentials, options).map_err(BindError::Tls)?;
    let socket = Arc::new(socket::SmallBites { inner: socket, datagram_max: usize::from(UDP_PAYLOAD_LOCAL) });
    quinn::Endpoint::new_with_abstract_socket(config, None, socket, runtime)
        .map_err(|source| BindError::new(address, source))
}

fn endpoint_config(credentials: Option<&Credentials>, options: &NetOptions) -> Result<EndpointConfig, TlsError> {
    let secret = credentials.map_or_else(rand::random, |known| known.derive_secret("holdfast 2025 stateless reset"));
    let mut config = EndpointConfig::new(Arc::new(ResetKey(secret)));
    // Derived from the node's key, so that a restarted process recognises the connections of its former life
    // and resets them at once: its peers need not wait for the idle timeout.
    let seed = options.rng_seed;
    config.cid_generator(move || Box::new(RandomIds(seed.map_or_else(StdRng::from_os_rng, StdRng::from_seed))));
    config.max_udp_payload_size(UDP_PAYLOAD_LOCAL).map_err(|e| TlsError::Setup(e.to_string()))?;
    config.rng_seed(options.rng_seed);
    Ok(config)
}

/// Bytes of a datagram to a peer on this machine: some have made the loopback carry less than Linux does by itself.
fn payload_local() -> u16 {
    static PAYLOAD: LazyLock<u16> = LazyLock::new(|| {
        let mtu = std::fs::read_to_string("/sys/class/net/lo/mtu").ok().and_then(|mtu| mtu.trim().parse().ok());
        mtu.map_or(UDP_PAYLOAD_LOCAL, payload_within)
    });
    *PAYLOAD
}

/// What fits into packets of `mtu` bytes beside the headers of IPv6 and UDP; at least what QUIC needs.
fn payload_within(mtu: u32) -> u16 {
    u16::try_from(mtu.saturating_sub(48)).map_or(UDP_PAYLOAD_LOCAL, |room| room.clamp(1200, UDP_PAYLOAD_LOCAL))
}

/// `local` is for peers on this machine, where large datagrams need no discovery.
pub(super) fn transport(options: &NetOptions, local: bool) -> Arc<TransportConfig> {
    let payload_max = if local { payload_local() } else { UDP_PAYLOAD_REMOTE };
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(payload_max).black_hole_cooldown(Duration::from_secs(5));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(if local { WINDOW_INITIAL_LOCAL } else { WINDOW_INITIAL_REMOTE });
    let mut config = TransportConfig::default();
    config
        .congestion_controller_factory(Arc::new(congestion))
        .initial_mtu(if local { payload_max } else { UDP_PAYLOAD_INITIAL })
        .enable_segmentation_offload(!local)
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_PER_CONNECTION))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        // First come, first served: interleaved blocks would all arrive last, and cost more. See `frame::write`.
        .send_fairness(false)
        // A lost first packet is sent again well within `connect_timeout`.
        .initial_rtt(Duration::from_millis(50))
        .keep_alive_interval(Some(options.keep_alive))
        .max_idle_timeout(IdleTimeout::try_from(options.idle_timeout).ok());
    Arc::new(config)
}

pub(super) fn client_config(
    tls: rustls::ClientConfig,
    options: &NetOptions,
    local: bool,
) -> Result<quinn::ClientConfig, TlsError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| TlsError::Setup(e.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(options, local));
    Ok(config)
}

pub(super) fn server_config(
    tls: rustls::ServerConfig,
    options: &NetOptions,
    local: bool,
) -> Result<quinn::ServerConfig, TlsError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| TlsError::Setup(e.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(options, local)).max_incoming(INCOMING_MAX).incoming_buffer_size(1 << 20);
    Ok(config)
}

/// Random connection ids. Unlike quinn's own, which are checked against a key that is lost with the
/// process, all are taken for ours, so that those of a former life are answered with a reset.
struct RandomIds(StdRng);

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&self.0.random::<[u8; CONNECTION_ID_SIZE]>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_SIZE
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Signs the tokens with which an endpoint that has lost a connection's state says so.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(&blake3::keyed_hash(&self.0, data).as_bytes()[..signature_out.len()]);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // Comparing through `blake3::Hash` takes the same time wherever the first difference is.
        match <[u8; 32]>::try_from(signature) {
            Ok(given) if expected == blake3::Hash::from_bytes(given) => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_fits_into_what_the_loopback_carries() {
        for (mtu, payload) in
            [(65_536, UDP_PAYLOAD_LOCAL), (u32::MAX, UDP_PAYLOAD_LOCAL), (16_436, 16_388), (1500, 1452), (68, 1200)]
        {
            assert_eq!(payload_within(mtu), payload, "{mtu}");
        }
    }
}
