//! Serving: accepting connections, finding out who is there, and answering requests within bounds.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Connection, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};

use super::{
    Frame, Serve,
    call::trust_problem,
    enrol::{self, Enrol},
    frame::{self, ByteBudget, CODE_MALFORMED, FrameError, FrameLimits, ResetOnDrop},
    identity::PeerIdentity,
    quic::{CODE_BUSY, CODE_UNTRUSTED, NetOptions, server_config},
    tls::{Credentials, TlsError, certificate_identity},
};
use crate::{types::ClusterId, wire::ALPN_ENROL};

/// A peer that has not finished its handshake by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that has begun to arrive must be complete by then, and its answer be taken: it holds a place and memory.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(30);
/// Unfinished handshakes at once: their peers are unknown.
const HANDSHAKES_MAX: usize = 256;
/// Enrolments at once.
const ENROLMENTS_MAX: usize = 16;

/// What all connections of one `serve` share.
pub(super) struct Server {
    endpoint: quinn::Endpoint,
    cluster: ClusterId,
    /// For peers on this machine; the endpoint's own is for the others.
    local: Arc<quinn::ServerConfig>,
    service: Arc<dyn Serve>,
    enrol: Option<Arc<dyn Enrol>>,
    bytes: ByteBudget,
    requests: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    enrolments: Semaphore,
}

impl Server {
    pub(super) fn new(
        endpoint: quinn::Endpoint,
        credentials: &Credentials,
        options: &NetOptions,
        service: Arc<dyn Serve>,
        enrol: Option<Arc<dyn Enrol>>,
    ) -> Result<Arc<Self>, TlsError> {
        let tls = |local| server_config(credentials.server_config(enrol.is_some())?, options, local);
        endpoint.set_server_config(Some(tls(false)?));
        Ok(Arc::new(Self {
            endpoint,
            cluster: credentials.cluster,
            local: Arc::new(tls(true)?),
            service,
            enrol,
            bytes: ByteBudget::new(options.request_bytes_max),
            requests: Arc::new(Semaphore::new(options.requests_max)),
            connections: Arc::new(Semaphore::new(options.connections_max)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            enrolments: Semaphore::new(ENROLMENTS_MAX),
        }))
    }

    /// Until the endpoint is closed. Dropped, it ends its connections.
    pub(super) async fn run(self: Arc<Self>) {
        let mut conversations = JoinSet::new();
        loop {
            tokio::select! {
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.admit(incoming, &mut conversations),
                    None => break,
                },
                Some(ended) = conversations.join_next(), if !conversations.is_empty() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "serving a connection failed");
                    }
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, incoming: Incoming, conversations: &mut JoinSet<()>) {
        let places =
            self.connections.clone().try_acquire_owned().ok().zip(self.handshakes.clone().try_acquire_owned().ok());
        match places {
            Some((connection, handshake)) => {
                let server = self.clone();
                conversations.spawn(async move {
                    server.meet(incoming, handshake).await;
                    drop(connection);
                });
            }
            None => {
                tracing::warn!(peer = %incoming.remote_address(), "a connection is refused: there are too many");
                incoming.refuse();
            }
        }
    }

    async fn meet(self: Arc<Self>, incoming: Incoming, handshake: OwnedSemaphorePermit) {
        let address = incoming.remote_address();
        match timeout(HANDSHAKE_TIMEOUT, self.handshake(incoming)).await {
            Ok(Ok(connection)) => {
                drop(handshake);
                self.converse(connection, address).await;
            }
            Ok(Err(error)) => match trust_problem(&error) {
                Some(reason) => {
                    tracing::warn!(peer = %address, reason, "a connection is refused: its certificate is not acceptable here")
                }
                None => tracing::debug!(peer = %address, %error, "a connection was not completed"),
            },
            Err(_) => tracing::debug!(peer = %address, "a connection was not completed in time"),
        }
    }

    async fn handshake(&self, incoming: Incoming) -> Result<Connection, quinn::ConnectionError> {
        if incoming.remote_address().ip().is_loopback() {
            incoming.accept_with(self.local.clone())?.await
        } else {
            incoming.accept()?.await
        }
    }

    async fn converse(self: Arc<Self>, connection: Connection, address: SocketAddr) {
        if let (Some(enrol), true) = (&self.enrol, is_enrolment(&connection)) {
            return self.enrol(enrol.clone(), &connection, address).await;
        }
        match peer_identity(&connection, self.cluster) {
            Ok(peer) => self.answer_all(&connection, peer).await,
            Err(reason) => {
                tracing::warn!(peer = %address, reason, "a connection is refused");
                connection.close(CODE_UNTRUSTED, reason.as_bytes());
            }
        }
    }

    async fn enrol(&self, service: Arc<dyn Enrol>, connection: &Connection, address: SocketAddr) {
        match self.enrolments.try_acquire() {
            Ok(_place) => enrol::answer(service, connection, address).await,
            Err(_) => connection.close(CODE_BUSY, b"too many enrolments at once; try again"),
        }
    }

    /// Requests are taken from the connection only when there is a place for them: what waits, waits at the peer.
    async fn answer_all(self: &Arc<Self>, connection: &Connection, peer: PeerIdentity) {
        while let Ok((send, recv)) = connection.accept_bi().await {
            let Ok(place) = self.requests.clone().acquire_owned().await else { return };
            tokio::spawn(self.clone().answer(peer, send, recv, place));
        }
    }

    async fn answer(
        self: Arc<Self>,
        peer: PeerIdentity,
        send: SendStream,
        recv: RecvStream,
        place: OwnedSemaphorePermit,
    ) {
        let send = ResetOnDrop::new(send);
        match self.receive(recv).await {
            Ok((request, memory)) => {
                let reply = self.service.clone().serve(peer, request).await;
                // The request is gone; what its answer takes is bounded by its place.
                drop(memory);
                deliver(peer, send, reply).await;
            }
            Err(error @ (FrameError::TooLong { .. } | FrameError::Short | FrameError::Trailing)) => {
                tracing::warn!(peer = %peer.node, %error, "a request is refused");
                send.reset(CODE_MALFORMED);
            }
            Err(error) => tracing::debug!(peer = %peer.node, %error, "a request was not received"),
        }
        drop(place);
    }

    async fn receive(&self, mut recv: RecvStream) -> Result<(Frame, Option<OwnedSemaphorePermit>), FrameError> {
        let received = frame::read(&mut recv, FrameLimits::NORMAL, Some(&self.bytes));
        match timeout(TRANSFER_TIMEOUT, received).await {
            Ok(Err(error)) => {
                frame::stop(&mut recv, CODE_MALFORMED);
                Err(error)
            }
            Ok(received) => received,
            Err(_) => Err(FrameError::Stream(format!("it was not complete within {TRANSFER_TIMEOUT:?}"))),
        }
    }
}

async fn deliver(peer: PeerIdentity, mut send: ResetOnDrop, reply: Frame) {
    match timeout(TRANSFER_TIMEOUT, frame::write(&mut send.stream, reply, FrameLimits::NORMAL)).await {
        Ok(Ok(())) => send.disarm(),
        Ok(Err(error @ FrameError::TooLong { .. })) => {
            tracing::error!(peer = %peer.node, %error, "an answer cannot be sent");
        }
        Ok(Err(error)) => tracing::debug!(peer = %peer.node, %error, "an answer was not delivered"),
        Err(_) => tracing::warn!(peer = %peer.node, "an answer was not taken within {TRANSFER_TIMEOUT:?}"),
    }
}

fn is_enrolment(connection: &Connection) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .is_some_and(|protocol| protocol == ALPN_ENROL)
}

/// Whom the certificate names, which TLS has verified.
fn peer_identity(connection: &Connection, cluster: ClusterId) -> Result<PeerIdentity, String> {
    let chain = connection.peer_identity().and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(certificate) = chain.as_ref().and_then(|chain| chain.first()) else {
        return Err("it has no certificate of this cluster".into());
    };
    let identity = certificate_identity(certificate).map_err(|e| e.to_string())?;
    if identity.cluster != cluster {
        return Err(format!("it belongs to cluster {}, not to {cluster}", identity.cluster));
    }
    Ok(identity)
}
