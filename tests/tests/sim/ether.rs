//! A network of QUIC over simulated datagrams, which get lost, repeated, late and out of order.
//!
//! Above the datagrams real endpoints with real certificates speak. Their calls may have a fate of their own, which a connection that breaks in
//! the worst moment would give them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use holdfast_common::{
    clock::{Clock, SystemClock},
    net::{
        BoxFuture, CallError, Endpoint, Frame, Peers, Serve,
        identity::{NodeName, Role},
        quic::{NetOptions, Node},
        tls::{Ca, Credentials, NODE_VALIDITY},
    },
};
use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::task::AbortHandle;

use crate::node::CLUSTER;

const PORT: u16 = 7600;
/// Datagrams that wait at a socket; what comes then is lost.
const QUEUE_MAX: usize = 4096;
/// Orders of the metadata server are few, and those that come late are the dangerous ones.
const LATE_ORDERS: u32 = 8;
/// A request is carried out at the latest.
const LATE_MAX: Duration = Duration::from_secs(4);
/// Before whoever asked believes that there is no answer.
const NO_ANSWER_AFTER: Duration = Duration::from_millis(30);

/// What the network does now.
#[derive(Debug)]
pub(crate) struct Weather {
    /// In a hundred datagrams.
    pub(crate) lost: u32,
    pub(crate) repeated: u32,
    /// Milliseconds that a datagram takes at most: the next one may be faster.
    pub(crate) late: u64,
    /// In a hundred calls: the connection breaks before the request arrives, or before the answer does; the request arrives twice; or it
    /// is carried out when whoever asked has long stopped waiting.
    pub(crate) calls_lost: u32,
    pub(crate) answers_lost: u32,
    pub(crate) calls_twice: u32,
    pub(crate) calls_late: u32,
    /// Nothing goes from the first to the second.
    pub(crate) cut: BTreeSet<(NodeName, NodeName)>,
}

impl Default for Weather {
    fn default() -> Self {
        let (lost, repeated, late) = (0, 0, 1);
        let (calls_lost, answers_lost, calls_twice, calls_late) = (0, 0, 0, 1);
        Self { lost, repeated, late, calls_lost, answers_lost, calls_twice, calls_late, cut: BTreeSet::new() }
    }
}

/// How often each thing went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) datagrams: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    pub(crate) cut: u64,
    pub(crate) calls: u64,
    pub(crate) calls_broken: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.datagrams += other.datagrams;
        self.lost += other.lost;
        self.repeated += other.repeated;
        self.cut += other.cut;
        self.calls += other.calls;
        self.calls_broken += other.calls_broken;
    }
}

/// A datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    pub(crate) at: Duration,
    pub(crate) from: NodeName,
    pub(crate) to: NodeName,
    pub(crate) bytes: usize,
}

struct State {
    random: StdRng,
    weather: Weather,
    sockets: BTreeMap<SocketAddr, Weak<Mailbox>>,
    credentials: BTreeMap<NodeName, Credentials>,
    counts: Counts,
    sent: Vec<Sent>,
}

#[derive(Clone)]
pub(crate) struct Ether {
    state: Arc<Mutex<State>>,
    ca: Arc<Ca>,
    begun: tokio::time::Instant,
}

/// What becomes of a call.
enum Fate {
    Arrives,
    Lost,
    AnswerLost,
    Twice,
    Late(Duration),
}

/// A process on the network, until it is dropped: then nothing that it says arrives any more.
pub(crate) struct Host {
    name: NodeName,
    node: Arc<Node>,
    mailbox: Arc<Mailbox>,
    ether: Ether,
    serving: Mutex<Option<AbortHandle>>,
}

impl Ether {
    pub(crate) fn new(seed: u64) -> Self {
        let state = State {
            random: StdRng::seed_from_u64(seed),
            weather: Weather::default(),
            sockets: BTreeMap::new(),
            credentials: BTreeMap::new(),
            counts: Counts::default(),
            sent: Vec::new(),
        };
        let ca = Ca::create(CLUSTER, SystemClock::default().now()).expect("a new authority");
        Self { state: Arc::new(Mutex::new(state)), ca: Arc::new(ca), begun: tokio::time::Instant::now() }
    }

    pub(crate) fn endpoint(name: NodeName) -> Endpoint {
        Endpoint { address: address(name), name }
    }

    /// A process of that name. One that there was before hears nothing from now on.
    pub(crate) fn host(&self, name: NodeName) -> Arc<Host> {
        let credentials = self.credentials(name);
        let mailbox = Arc::new(Mailbox::default());
        let mut options = NetOptions { ask_kernel: false, ..NetOptions::default() };
        {
            let mut state = self.state.lock();
            options.rng_seed = Some(state.random.random());
            state.sockets.insert(address(name), Arc::downgrade(&mailbox));
        }
        let socket = Arc::new(Socket { name, mailbox: Arc::clone(&mailbox), ether: self.clone() });
        let node = Node::on_socket(socket, Arc::new(TokioRuntime), credentials, options).expect("an endpoint");
        Arc::new(Host { name, node, mailbox, ether: self.clone(), serving: Mutex::default() })
    }

    fn credentials(&self, name: NodeName) -> Credentials {
        let known = self.state.lock().credentials.get(&name).cloned();
        known.unwrap_or_else(|| {
            let now = SystemClock::default().now();
            let issued = self.ca.issue_credentials(name, now, NODE_VALIDITY).expect("a certificate");
            self.state.lock().credentials.insert(name, issued.clone());
            issued
        })
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.state.lock().weather);
    }

    pub(crate) fn clear_up(&self) {
        self.state.lock().weather = Weather::default();
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// All that was sent so far.
    pub(crate) fn sent(&self) -> Vec<Sent> {
        self.state.lock().sent.clone()
    }

    fn send(&self, from: NodeName, to: SocketAddr, bytes: &[u8]) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.counts.datagrams += 1;
        let whom = name_at(to);
        state.sent.push(Sent { at: self.begun.elapsed(), from, to: whom, bytes: bytes.len() });
        if state.weather.cut.contains(&(from, whom)) {
            state.counts.cut += 1;
            return;
        }
        let drawn = state.random.random_range(0..100);
        let weather = &state.weather;
        let copies = match drawn {
            _ if drawn < weather.lost => 0,
            _ if drawn < weather.lost + weather.repeated => 2,
            _ => 1,
        };
        state.counts.lost += u64::from(copies == 0);
        state.counts.repeated += u64::from(copies == 2);
        for _ in 0..copies {
            let late = Duration::from_millis(state.random.random_range(0..=state.weather.late));
            let (ether, bytes) = (self.clone(), bytes.to_vec());
            tokio::spawn(async move {
                tokio::time::sleep(late).await;
                ether.deliver(from, to, bytes);
            });
        }
    }

    fn deliver(&self, from: NodeName, to: SocketAddr, bytes: Vec<u8>) {
        let mailbox = self.state.lock().sockets.get(&to).and_then(Weak::upgrade);
        if let Some(mailbox) = mailbox {
            mailbox.put(address(from), bytes);
        }
    }

    /// Who looks at what has become of a cluster sees it.
    fn fate_of_call(&self, from: NodeName) -> Fate {
        if from.role == Role::Admin {
            return Fate::Arrives;
        }
        let mut state = self.state.lock();
        let drawn = state.random.random_range(0..100);
        let Weather { calls_lost, answers_lost, calls_twice, mut calls_late, .. } = state.weather;
        if from.role == Role::Meta {
            calls_late *= LATE_ORDERS;
        }
        let (broken, twice) = (calls_lost + answers_lost, calls_lost + answers_lost + calls_twice);
        let fate = match drawn {
            _ if drawn < calls_lost => Fate::Lost,
            _ if drawn < broken => Fate::AnswerLost,
            _ if drawn < twice => Fate::Twice,
            _ if drawn < twice + calls_late => Fate::Late(state.random.random_range(Duration::ZERO..LATE_MAX)),
            _ => Fate::Arrives,
        };
        state.counts.calls += 1;
        state.counts.calls_broken += u64::from(!matches!(fate, Fate::Arrives));
        fate
    }
}

const ROLES: [Role; 4] = [Role::Meta, Role::Storage, Role::Client, Role::Admin];

fn address(name: NodeName) -> SocketAddr {
    let role = ROLES.iter().position(|role| *role == name.role).and_then(|n| u8::try_from(n).ok());
    let id = u8::try_from(name.id).expect("few nodes of a role");
    (Ipv4Addr::new(10, 0, role.expect("one of them"), id), PORT).into()
}

fn name_at(address: SocketAddr) -> NodeName {
    match address.ip() {
        std::net::IpAddr::V4(ip) => {
            let [_, _, role, id] = ip.octets();
            NodeName { role: ROLES[usize::from(role)], id: u32::from(id) }
        }
        std::net::IpAddr::V6(_) => unreachable!("nobody has such an address here"),
    }
}

impl Host {
    pub(crate) fn endpoint(&self) -> Endpoint {
        Ether::endpoint(self.name)
    }

    /// Answers calls from now on.
    pub(crate) fn serve(&self, service: Arc<dyn Serve>) {
        let serving = tokio::spawn(self.node.serve(service, None).expect("its certificate is good"));
        *self.serving.lock() = Some(serving.abort_handle());
    }

    /// From now on it says and hears nothing.
    pub(crate) fn die(&self) {
        self.mailbox.close();
        self.serving.lock().take().into_iter().for_each(|serving| serving.abort());
        self.node.close();
    }

    async fn meet(&self, to: Endpoint, request: Frame, deadline: Duration) -> Result<Frame, CallError> {
        let again = Frame { header: request.header.clone(), payload: request.payload.clone() };
        match self.ether.fate_of_call(self.name) {
            Fate::Arrives => self.node.call(to, request, deadline).await,
            Fate::Twice => {
                drop(self.node.call(to, again, deadline).await);
                self.node.call(to, request, deadline).await
            }
            Fate::Lost => broken(to, deadline).await,
            Fate::Late(late) => {
                let node = Arc::clone(&self.node);
                tokio::spawn(async move {
                    tokio::time::sleep(late).await;
                    node.call(to, again, deadline).await
                });
                broken(to, deadline).await
            }
            Fate::AnswerLost => {
                self.node.call(to, request, deadline).await?;
                broken(to, deadline).await
            }
        }
    }
}

async fn broken(to: Endpoint, deadline: Duration) -> Result<Frame, CallError> {
    tokio::time::sleep(NO_ANSWER_AFTER.min(deadline)).await;
    Err(CallError::Lost(to.address, "a simulated break".into()))
}

impl Drop for Host {
    fn drop(&mut self) {
        self.die();
    }
}

impl Peers for Host {
    fn call(&self, to: Endpoint, request: Frame, deadline: Duration) -> BoxFuture<'_, Result<Frame, CallError>> {
        Box::pin(self.meet(to, request, deadline))
    }
}

/// What has arrived at a socket.
#[derive(Debug, Default)]
struct Mailbox(Mutex<Mail>);

#[derive(Debug, Default)]
struct Mail {
    waiting: VecDeque<(SocketAddr, Vec<u8>)>,
    waker: Option<Waker>,
    is_closed: bool,
}

impl Mailbox {
    fn put(&self, from: SocketAddr, bytes: Vec<u8>) {
        let mut mail = self.0.lock();
        if !mail.is_closed && mail.waiting.len() < QUEUE_MAX {
            mail.waiting.push_back((from, bytes));
            mail.waker.take().into_iter().for_each(Waker::wake);
        }
    }

    fn close(&self) {
        let mut mail = self.0.lock();
        mail.is_closed = true;
        mail.waiting.clear();
    }
}

struct Socket {
    name: NodeName,
    mailbox: Arc<Mailbox>,
    ether: Ether,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("name", &self.name).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if !self.mailbox.0.lock().is_closed {
            self.ether.send(self.name, transmit.destination, transmit.contents);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut mail = self.mailbox.0.lock();
        let mut count = 0;
        while count < buffers.len().min(meta.len())
            && let Some((from, bytes)) = mail.waiting.pop_front()
        {
            let length = bytes.len().min(buffers[count].len());
            buffers[count][..length].copy_from_slice(&bytes[..length]);
            meta[count] = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
            count += 1;
        }
        if count > 0 {
            return Poll::Ready(Ok(count));
        }
        mail.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(address(self.name))
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
