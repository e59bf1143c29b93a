//! Transport: one request, one answer, between processes that have proved who they are.
//!
//! Everything above this module speaks [`Peers`] and [`Serve`]; only this folder knows quinn and rustls.

mod call;
pub mod enrol;
mod frame;
pub mod identity;
pub mod probe;
pub mod quic;
mod serve;
mod socket;
pub mod tls;

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;

use identity::{NodeName, PeerIdentity};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One message: an encoded header (≤ `HEADER_SIZE_MAX`) and raw bytes (≤ `PAYLOAD_SIZE_MAX`). The payload may be
/// given in parts, so that blocks of a batch need not be copied together; it arrives as one part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub header: Vec<u8>,
    pub payload: Vec<Bytes>,
}

/// Whom to call: an address, and the name that its certificate must prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub name: NodeName,
}

/// Why there is no answer. The request may or may not have been carried out.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    #[error("no connection to {0}: {1}")]
    Connect(SocketAddr, String),
    #[error("the connection to {0} was lost: {1}")]
    Lost(SocketAddr, String),
    #[error("no answer from {0} within {1:?}")]
    Deadline(SocketAddr, Duration),
    #[error("{0} sent an answer that does not decode: {1}")]
    Malformed(SocketAddr, String),
    #[error("{0} is not who it should be, or refuses this certificate: {1}")]
    Untrusted(SocketAddr, String),
}

/// The network as a seam: QUIC in production, simulated in tests.
pub trait Peers: Send + Sync + 'static {
    /// Sends `request` and waits for its answer at most `deadline`. Connects if there is no connection; a broken one is
    /// made again on the next call. Dropping the future cancels the request.
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>>;
}

/// A server's side: answers every request of every peer. Concurrent requests run concurrently. A request that has begun is
/// not cancelled when its caller goes away.
pub trait Serve: Send + Sync + 'static {
    fn serve(self: Arc<Self>, from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame>;
}

#[cfg(test)]
mod tests;
