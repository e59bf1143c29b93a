//! Calling: one connection for each endpoint, made when it is first needed and again when it has broken.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quinn::{Connection, ConnectionError, VarInt};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    CallError, Endpoint, Frame,
    frame::{self, FrameError, FrameLimits, ResetOnDrop},
    identity::PeerIdentity,
    quic::{CODE_CLOSING, CODE_UNTRUSTED, NetOptions, client_config},
    socket,
    tls::{Credentials, TlsError},
};
use crate::types::ClusterId;

/// A peer that owes an answer and has sent nothing for so long gets its kernel asked whether it lives.
const SILENCE_MAX: Duration = Duration::from_millis(200);
/// How long that kernel has to say no.
const ASK_TIMEOUT: Duration = Duration::from_millis(200);

type Made = Option<Result<Line, CallError>>;

#[derive(Debug)]
pub(super) struct Caller {
    endpoint: quinn::Endpoint,
    cluster: ClusterId,
    /// For peers elsewhere, and for those on this machine.
    remote: quinn::ClientConfig,
    local: quinn::ClientConfig,
    connect_timeout: Duration,
    ask_kernel: bool,
    lines: parking::Lines,
}

/// The map of lines, locked for moments only.
mod parking {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::{Endpoint, HashMap, Made, watch};

    type Map = HashMap<Endpoint, watch::Receiver<Made>>;

    #[derive(Debug, Default)]
    pub(super) struct Lines(Mutex<Map>);

    impl Lines {
        /// Nothing that runs under the lock can panic half-way.
        pub(super) fn lock(&self) -> MutexGuard<'_, Map> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

/// A connection in use.
#[derive(Clone, Debug)]
struct Line {
    connection: Connection,
    waiting: Arc<Waiting>,
}

/// How many calls wait for an answer on a connection.
#[derive(Debug, Default)]
struct Waiting {
    calls: AtomicUsize,
    begun: Notify,
}

struct WaitingCall(Arc<Waiting>);

impl WaitingCall {
    fn begin(waiting: &Arc<Waiting>) -> Self {
        if waiting.calls.fetch_add(1, Ordering::Relaxed) == 0 {
            waiting.begun.notify_one();
        }
        Self(waiting.clone())
    }
}

impl Drop for WaitingCall {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Caller {
    pub(super) fn new(
        endpoint: quinn::Endpoint,
        credentials: &Credentials,
        options: &NetOptions,
    ) -> Result<Self, TlsError> {
        Ok(Self {
            endpoint,
            cluster: credentials.cluster,
            remote: client_config(credentials.client_config()?, options, false)?,
            local: client_config(credentials.client_config()?, options, true)?,
            connect_timeout: options.connect_timeout,
            ask_kernel: options.ask_kernel,
            lines: parking::Lines::default(),
        })
    }

    pub(super) async fn call(
        self: &Arc<Self>,
        to: Endpoint,
        request: Frame,
        deadline: Duration,
    ) -> Result<Frame, CallError> {
        let address = to.address;
        let expiry = Instant::now() + deadline;
        let line = match timeout_at(expiry, self.line(to)).await {
            Ok(made) => made?,
            // The request was not sent, which is more than `Deadline` says.
            Err(_) => return Err(CallError::Connect(address, format!("no answer within {deadline:?}"))),
        };
        let waiting = WaitingCall::begin(&line.waiting);
        let outcome = timeout_at(expiry, exchange(&line.connection, request)).await;
        drop(waiting);
        match outcome {
            Ok(result) => result.map_err(|error| call_error(address, error)),
            Err(_) => Err(CallError::Deadline(address, deadline)),
        }
    }

    /// The live connection to `to`; all who ask while one is being made wait for the same one.
    async fn line(self: &Arc<Self>, to: Endpoint) -> Result<Line, CallError> {
        let mut made = self.existing_or_new(to);
        let result = match made.wait_for(Option::is_some).await {
            Ok(made) => made.clone(),
            Err(_) => None,
        };
        result.unwrap_or_else(|| Err(CallError::Connect(to.address, "the process is stopping".into())))
    }

    fn existing_or_new(self: &Arc<Self>, to: Endpoint) -> watch::Receiver<Made> {
        let mut lines = self.lines.lock();
        if let Some(made) = lines.get(&to)
            && is_usable(made)
        {
            return made.clone();
        }
        let (sender, made) = watch::channel(None);
        lines.insert(to, made.clone());
        tokio::spawn(self.clone().keep(to, sender));
        made
    }

    /// Makes a connection, and looks after it until it ends.
    async fn keep(self: Arc<Self>, to: Endpoint, made: watch::Sender<Made>) {
        let result = self.connect(to).await;
        if let Err(CallError::Untrusted(_, reason)) = &result {
            tracing::warn!(peer = %to.name, address = %to.address, reason, "no connection: the peer is not trusted, or refuses us");
        }
        made.send_replace(Some(result.clone()));
        if let Ok(line) = result {
            let reason = self.watch(to.address, &line).await;
            tracing::debug!(peer = %to.name, address = %to.address, %reason, "the connection has ended");
        }
        let mut lines = self.lines.lock();
        if lines.get(&to).is_some_and(|known| made.subscribe().same_channel(known)) {
            lines.remove(&to);
        }
    }

    async fn connect(&self, to: Endpoint) -> Result<Line, CallError> {
        let name = PeerIdentity { cluster: self.cluster, node: to.name }.dns_name();
        let config = if to.address.ip().is_loopback() { &self.local } else { &self.remote };
        let failed = |reason: String| CallError::Connect(to.address, reason);
        let connecting =
            self.endpoint.connect_with(config.clone(), to.address, &name).map_err(|e| failed(e.to_string()))?;
        let connected = async {
            tokio::select! {
                result = connecting => result.map_err(|error| connect_error(to.address, error)),
                reason = socket::refused(to.address), if self.ask_kernel => Err(failed(reason)),
            }
        };
        match timeout(self.connect_timeout, connected).await {
            Ok(result) => Ok(Line { connection: result?, waiting: Arc::default() }),
            Err(_) => Err(failed(format!("no answer within {:?}", self.connect_timeout))),
        }
    }

    /// Returns when the connection has ended. While calls wait and nothing comes, asks whether the peer lives,
    /// and ends the connection when it does not: those who wait need not wait for their deadlines.
    async fn watch(&self, address: SocketAddr, line: &Line) -> ConnectionError {
        let connection = &line.connection;
        tokio::select! {
            reason = connection.closed() => reason,
            () = peer_is_gone(address, line), if self.ask_kernel => {
                connection.close(VarInt::from_u32(0), b"nobody listens at the peer's address");
                connection.closed().await
            }
        }
    }
}

async fn peer_is_gone(address: SocketAddr, line: &Line) {
    let mut heard = Heard::default();
    loop {
        if line.waiting.calls.load(Ordering::Relaxed) == 0 {
            line.waiting.begun.notified().await;
        }
        heard.update(&line.connection);
        sleep(SILENCE_MAX).await;
        let (silent, unanswered) = heard.update(&line.connection);
        let owed = line.waiting.calls.load(Ordering::Relaxed) > 0;
        if silent && owed {
            if unanswered {
                nudge(&line.connection).await;
            }
            if timeout(ASK_TIMEOUT, socket::refused(address)).await.is_ok() {
                return;
            }
        }
    }
}

/// How many datagrams had come when the last one was noticed, and how many had been sent by then.
#[derive(Default)]
struct Heard {
    received: u64,
    sent: u64,
}

impl Heard {
    /// Has nothing come since the last time, and has something been sent since anything came?
    fn update(&mut self, connection: &Connection) -> (bool, bool) {
        let stats = connection.stats();
        let (received, sent) = (stats.udp_rx.datagrams, stats.udp_tx.datagrams);
        let silent = received == self.received;
        if !silent {
            *self = Self { received, sent };
        }
        (silent, sent > self.sent)
    }
}

/// Sends something. What waits to be sent again waits longer each time; a peer that has restarted resets the connection with the first packet
/// that it gets.
async fn nudge(connection: &Connection) {
    if let Ok(Ok((mut send, _))) = timeout(ASK_TIMEOUT, connection.open_bi()).await
        && let Err(error) = send.reset(CODE_CLOSING)
    {
        tracing::debug!(%error, "a stream was over before it began");
    }
}

/// Being made, or made and not broken since.
fn is_usable(made: &watch::Receiver<Made>) -> bool {
    match &*made.borrow() {
        None => made.has_changed().is_ok(),
        Some(Ok(line)) => line.connection.close_reason().is_none(),
        Some(Err(_)) => false,
    }
}

async fn exchange(connection: &Connection, request: Frame) -> Result<Frame, FrameError> {
    let (send, mut recv) = connection.open_bi().await?;
    let mut send = ResetOnDrop::new(send);
    frame::write(&mut send.stream, request, FrameLimits::NORMAL).await?;
    let (reply, _) = frame::read(&mut recv, FrameLimits::NORMAL, None).await?;
    send.disarm();
    Ok(reply)
}

fn call_error(address: SocketAddr, error: FrameError) -> CallError {
    match error {
        FrameError::Connection(error) => connection_error(address, error, CallError::Lost),
        FrameError::TooLong { .. } | FrameError::Short | FrameError::Trailing | FrameError::Refused => {
            CallError::Malformed(address, error.to_string())
        }
        FrameError::Dropped | FrameError::Stream(_) => CallError::Lost(address, error.to_string()),
    }
}

pub(super) fn connect_error(address: SocketAddr, error: ConnectionError) -> CallError {
    connection_error(address, error, CallError::Connect)
}

/// Matters of trust apart; `otherwise` for the rest.
fn connection_error(
    address: SocketAddr,
    error: ConnectionError,
    otherwise: fn(SocketAddr, String) -> CallError,
) -> CallError {
    match trust_problem(&error) {
        Some(reason) => CallError::Untrusted(address, reason),
        None => otherwise(address, error.to_string()),
    }
}

/// What TLS, here or there, found wrong with a certificate.
pub(super) fn trust_problem(error: &ConnectionError) -> Option<String> {
    match error {
        ConnectionError::TransportError(error) => is_alert(error.code).then(|| error.reason.clone()),
        ConnectionError::ConnectionClosed(close) => is_alert(close.error_code).then(|| {
            let alert = u64::from(close.error_code) & 0xff;
            format!("the peer refuses our certificate ({})", alert_meaning(alert))
        }),
        ConnectionError::ApplicationClosed(close) if close.error_code == CODE_UNTRUSTED => {
            Some(String::from_utf8_lossy(&close.reason).into_owned())
        }
        _ => None,
    }
}

fn is_alert(code: quinn::TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

/// RFC 8446, section 6.
fn alert_meaning(alert: u64) -> String {
    match alert {
        42 => "it is damaged".into(),
        43 => "it is of an unsupported kind".into(),
        44 => "it is revoked".into(),
        45 => "it has expired or is not valid yet".into(),
        46 => "it is not acceptable".into(),
        48 => "it was not signed by the peer's cluster".into(),
        51 => "its signature does not verify".into(),
        116 => "there is none".into(),
        120 => "it speaks another version of the protocol".into(),
        other => format!("TLS alert {other}"),
    }
}
