use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use super::{
    enrol::{Enrol, EnrolError, Token, TokenError, enrol},
    frame,
    identity::Role,
    quic::{BindError, NetOptions, Node},
    tls::{Ca, Credentials, Fingerprint, NODE_VALIDITY, NodeKey, TlsError},
    *,
};
use crate::{
    clock::{Clock, SystemClock},
    limits::{HEADER_SIZE_MAX, PAYLOAD_SIZE_MAX},
    refusal::Refusal,
    types::{ClusterId, Time},
    wire::{
        ALPN,
        enrol::{EnrolReply, EnrolRequest, Enrolled},
    },
};

const META: NodeName = NodeName { role: Role::Meta, id: 1 };
const STORAGE: NodeName = NodeName { role: Role::Storage, id: 7 };
const CLIENT: NodeName = NodeName { role: Role::Client, id: 3 };
const LONG: Duration = Duration::from_secs(20);

fn now() -> Time {
    SystemClock::default().now()
}

fn cluster(number: u8) -> Ca {
    Ca::create(ClusterId([number; 16]), now()).unwrap()
}

fn credentials(ca: &Ca, node: NodeName) -> Credentials {
    ca.issue_credentials(node, now(), NODE_VALIDITY).unwrap()
}

/// Valid until an hour ago.
fn expired(ca: &Ca, node: NodeName) -> Credentials {
    let before = Time { secs: now().secs - 7200, nanos: 0 };
    ca.issue_credentials(node, before, Duration::from_secs(3600)).unwrap()
}

fn bind(credentials: Credentials) -> Arc<Node> {
    bind_with(credentials, NetOptions::default())
}

fn bind_with(credentials: Credentials, options: NetOptions) -> Arc<Node> {
    Node::bind(([127, 0, 0, 1], 0).into(), credentials, options).unwrap()
}

fn endpoint(node: &Node, name: NodeName) -> Endpoint {
    Endpoint { address: node.local_address().unwrap(), name }
}

fn frame(header: &[u8], payload: &[&[u8]]) -> Frame {
    Frame { header: header.to_vec(), payload: payload.iter().map(|part| Bytes::copy_from_slice(part)).collect() }
}

/// Says who asked, and gives the payload back.
struct Echo;

impl Serve for Echo {
    fn serve(self: Arc<Self>, from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        let header = [from.node.to_string().as_bytes(), b" said ", &request.header].concat();
        Box::pin(async move { Frame { header, payload: request.payload } })
    }
}

/// Answers when it is told to.
#[derive(Default)]
struct Slow {
    begun: Notify,
    go_on: Notify,
    finished: AtomicUsize,
    done: Notify,
}

impl Serve for Slow {
    fn serve(self: Arc<Self>, _from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        Box::pin(async move {
            self.begun.notify_one();
            self.go_on.notified().await;
            self.finished.fetch_add(1, Ordering::SeqCst);
            self.done.notify_one();
            request
        })
    }
}

fn start(node: &Arc<Node>, service: Arc<dyn Serve>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(node.serve(service, None).unwrap())
}

struct Pair {
    server: Arc<Node>,
    client: Arc<Node>,
    to: Endpoint,
}

fn pair(service: Arc<dyn Serve>, options: NetOptions) -> Pair {
    let ca = cluster(1);
    let server = bind_with(credentials(&ca, STORAGE), options.clone());
    start(&server, service);
    let client = bind_with(credentials(&ca, CLIENT), options);
    Pair { to: endpoint(&server, STORAGE), server, client }
}

#[tokio::test(flavor = "current_thread")]
async fn a_server_answers_whom_the_certificate_names() {
    let Pair { client, to, .. } = pair(Arc::new(Echo), NetOptions::default());
    let mebibyte = vec![7; 1 << 20];
    let parts: [&[&[u8]]; 4] = [&[], &[&mebibyte], &[b"one ", b"", b"two"], &[&mebibyte, &mebibyte, &mebibyte, b""]];
    for payload in parts {
        let reply = client.call(to, frame(b"hello", payload), LONG).await.unwrap();
        assert_eq!(reply.header, b"3.client said hello");
        assert_eq!(reply.payload.concat(), payload.concat());
        assert!(reply.payload.len() <= 1, "a payload arrives as one part");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn both_sides_of_a_node_work_on_one_socket() {
    let ca = cluster(1);
    let nodes = [bind(credentials(&ca, STORAGE)), bind(credentials(&ca, META))];
    nodes.iter().for_each(|node| drop(start(node, Arc::new(Echo))));
    let [storage, meta] = &nodes;
    let reply = storage.call(endpoint(meta, META), frame(b"a", &[]), LONG).await.unwrap();
    assert_eq!(reply.header, b"7.storage said a");
    let reply = meta.call(endpoint(storage, STORAGE), frame(b"b", &[]), LONG).await.unwrap();
    assert_eq!(reply.header, b"1.meta said b");
}

#[tokio::test(flavor = "current_thread")]
async fn a_thousand_calls_at_once_are_all_answered() {
    let Pair { client, to, .. } = pair(Arc::new(Echo), NetOptions::default());
    let calls: Vec<_> = (0..1000u32)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move {
                let bytes = number.to_le_bytes();
                let reply = client.call(to, frame(&bytes, &[&bytes[..]; 64]), LONG).await.unwrap();
                assert_eq!(reply.payload.concat(), bytes.repeat(64));
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_peer_that_is_not_who_it_should_be_is_not_talked_to() {
    let (ours, foreign) = (cluster(1), cluster(2));
    let same_name = cluster(1);
    let cases = [
        ("another cluster", credentials(&foreign, STORAGE), credentials(&ours, CLIENT)),
        ("another CA under the same cluster id", credentials(&same_name, STORAGE), credentials(&ours, CLIENT)),
        ("another number", credentials(&ours, NodeName { id: 8, ..STORAGE }), credentials(&ours, CLIENT)),
        ("another role", credentials(&ours, NodeName { id: 7, ..CLIENT }), credentials(&ours, CLIENT)),
        ("an expired server", expired(&ours, STORAGE), credentials(&ours, CLIENT)),
        ("an expired client", credentials(&ours, STORAGE), expired(&ours, CLIENT)),
    ];
    for (what, server, client) in cases {
        let server = bind(server);
        start(&server, Arc::new(Echo));
        let result = bind(client).call(endpoint(&server, STORAGE), frame(b"", &[]), LONG).await;
        assert!(matches!(result, Err(CallError::Untrusted(..))), "{what}: {result:?}");
    }
}

/// A client made by hand, which trusts the server's CA and does what we like.
async fn raw_connection(server: &Node, tls: rustls::ClientConfig) -> Result<quinn::Connection, quinn::ConnectionError> {
    let socket = socket::bind(([127, 0, 0, 1], 0).into(), 1 << 20).unwrap();
    let runtime = Arc::new(quinn::TokioRuntime);
    let socket = quinn::Runtime::wrap_udp_socket(&*runtime, socket).unwrap();
    let endpoint = quic::new_endpoint(socket, runtime, None, &NetOptions::default()).unwrap();
    let config = quic::client_config(tls, &NetOptions::default(), true).unwrap();
    let name = server.credentials().identity().dns_name();
    endpoint.connect_with(config, server.local_address().unwrap(), &name).unwrap().await
}

/// TLS that trusts the CA of `server` and shows the certificate of nobody.
fn anonymous(server: &Credentials) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(server.ca().to_vec().into()).unwrap();
    let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider());
    let mut config = tls::client_builder(verifier.build().unwrap()).unwrap().with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

struct NoEnrolment;

impl Enrol for NoEnrolment {
    fn enrol(self: Arc<Self>, _request: EnrolRequest) -> BoxFuture<'static, EnrolReply> {
        Box::pin(async { EnrolReply(Err(Refusal::BadToken)) })
    }
}

#[tokio::test(flavor = "current_thread")]
async fn who_shows_no_certificate_is_answered_nothing() {
    for enrol in [None, Some(Arc::new(NoEnrolment) as Arc<dyn Enrol>)] {
        let server = bind(credentials(&cluster(1), META));
        tokio::spawn(server.serve(Arc::new(Echo), enrol).unwrap());
        if let Ok(connection) = raw_connection(&server, anonymous(server.credentials())).await {
            let reason = timeout(LONG, connection.closed()).await.unwrap();
            assert!(call::trust_problem(&reason).is_some(), "{reason}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_server_refuses_a_certificate_of_another_cluster() {
    let server = bind(credentials(&cluster(1), META));
    start(&server, Arc::new(Echo));
    let mut tls = credentials(&cluster(2), CLIENT).client_config().unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(server.credentials().ca().to_vec().into()).unwrap();
    let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider());
    tls.dangerous().set_certificate_verifier(verifier.build().unwrap());
    if let Ok(connection) = raw_connection(&server, tls).await {
        let reason = timeout(LONG, connection.closed()).await.unwrap();
        assert!(call::trust_problem(&reason).is_some(), "{reason}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn frames_that_break_the_format_are_refused_and_the_rest_goes_on() {
    let ca = cluster(1);
    let server = bind(credentials(&ca, STORAGE));
    start(&server, Arc::new(Echo));
    let connection = raw_connection(&server, credentials(&ca, CLIENT).client_config().unwrap()).await.unwrap();
    let lengths = |header: usize, payload: usize| {
        [u32::try_from(header).unwrap().to_le_bytes(), u32::try_from(payload).unwrap().to_le_bytes()].concat()
    };
    let cases = [
        ("a long header", lengths(HEADER_SIZE_MAX + 1, 0)),
        ("a long payload", lengths(0, PAYLOAD_SIZE_MAX + 1)),
        ("the longest of both", vec![0xff; 8]),
        ("half a preamble", vec![0; 4]),
        ("half a header", [lengths(4, 0), vec![1, 2]].concat()),
        ("half a payload", [lengths(1, 4), vec![1, 2, 3]].concat()),
        ("more than was announced", [lengths(1, 1), vec![1, 2, 3]].concat()),
    ];
    for (what, bytes) in cases {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
        let answer = timeout(LONG, recv.read_to_end(1 << 20)).await.unwrap();
        let refused = quinn::ReadError::Reset(frame::CODE_MALFORMED);
        assert_eq!(answer, Err(quinn::ReadToEndError::Read(refused)), "{what}");
    }
    let client = bind(credentials(&ca, CLIENT));
    client.call(endpoint(&server, STORAGE), frame(b"fine", &[]), LONG).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn the_longest_frame_passes_and_a_longer_one_is_not_sent() {
    let Pair { client, to, .. } = pair(Arc::new(Echo), NetOptions::default());
    let longest = Bytes::from(vec![1; PAYLOAD_SIZE_MAX]);
    let request = Frame { header: vec![2; HEADER_SIZE_MAX - 64], payload: vec![longest.clone()] };
    assert_eq!(client.call(to, request, LONG).await.unwrap().payload.concat(), longest);
    for request in [
        Frame { header: vec![0; HEADER_SIZE_MAX + 1], payload: Vec::new() },
        Frame { header: Vec::new(), payload: vec![longest, Bytes::from_static(b"1")] },
    ] {
        let result = client.call(to, request, LONG).await;
        assert!(matches!(result, Err(CallError::Malformed(..))), "{result:?}");
    }
}

/// Answers with more than a frame may hold, or panics.
struct Broken;

impl Serve for Broken {
    fn serve(self: Arc<Self>, _from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        assert!(request.header.is_empty(), "as the test wants");
        Box::pin(async { Frame { header: vec![0; HEADER_SIZE_MAX + 1], payload: Vec::new() } })
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_server_that_cannot_answer_does_not_leave_the_caller_waiting() {
    let Pair { client, to, .. } = pair(Arc::new(Broken), NetOptions::default());
    for header in [&b""[..], b"panic"] {
        let result = client.call(to, frame(header, &[]), LONG).await;
        assert!(matches!(result, Err(CallError::Lost(..))), "{result:?}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_server_that_does_not_answer_costs_the_deadline() {
    let Pair { client, to, .. } = pair(Arc::<Slow>::default(), NetOptions::default());
    let deadline = Duration::from_millis(300);
    let started = std::time::Instant::now();
    let result = client.call(to, frame(b"", &[]), deadline).await;
    assert!(matches!(result, Err(CallError::Deadline(..))), "{result:?}");
    assert!(started.elapsed() >= deadline && started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "current_thread")]
async fn nobody_behind_an_address_is_noticed_at_once_and_silence_at_the_timeout() {
    let client = bind(credentials(&cluster(1), CLIENT));
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let to = Endpoint { address, name: STORAGE };
    for (deadline, expected) in [(LONG, 1000), (Duration::from_millis(200), 200)] {
        let started = std::time::Instant::now();
        let result = client.call(to, frame(b"", &[]), deadline).await;
        assert!(matches!(result, Err(CallError::Connect(..))), "{result:?}");
        let elapsed = started.elapsed().as_millis();
        assert!((expected..expected + 900).contains(&elapsed), "{elapsed} ms");
    }
    drop(silent);
    let started = std::time::Instant::now();
    let result = client.call(to, frame(b"", &[]), LONG).await;
    assert!(matches!(result, Err(CallError::Connect(..))), "{result:?}");
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

/// A server in a thread with a runtime of its own, which can die without a word.
struct Process {
    address: SocketAddr,
    die: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Process {
    fn start(listen: SocketAddr, credentials: Credentials, service: Arc<dyn Serve>) -> Self {
        let (die, death) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let node = Node::bind(listen, credentials, NetOptions::default()).unwrap();
                tell.send(node.local_address().unwrap()).unwrap();
                tokio::spawn(node.serve(service, None).unwrap());
                death.await.unwrap();
            });
        });
        Self { address: told.recv().unwrap(), die, thread }
    }

    /// No packet says good-bye: the runtime is gone before it could.
    fn kill(self) {
        self.die.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

/// Dozens of deadlines long, and far below the idle timeout: what takes less was noticed, not waited for.
const AT_ONCE: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "current_thread")]
async fn a_killed_server_is_noticed_and_found_again() {
    let ca = cluster(1);
    let (server, client) = (credentials(&ca, STORAGE), bind(credentials(&ca, CLIENT)));
    let slow = Arc::<Slow>::default();
    let process = Process::start(([127, 0, 0, 1], 0).into(), server.clone(), slow.clone());
    let to = Endpoint { address: process.address, name: STORAGE };
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.call(to, frame(b"", &[]), LONG).await }
    });
    slow.begun.notified().await;
    process.kill();
    let result = timeout(AT_ONCE, waiting).await.unwrap().unwrap();
    assert!(matches!(result, Err(CallError::Lost(..))), "{result:?}");
    let result = timeout(AT_ONCE, client.call(to, frame(b"", &[]), LONG)).await.unwrap();
    assert!(matches!(result, Err(CallError::Connect(..))), "{result:?}");

    let process = Process::start(to.address, server, Arc::new(Echo));
    timeout(AT_ONCE, client.call(to, frame(b"", &[]), LONG)).await.unwrap().unwrap();
    process.kill();
}

#[tokio::test(flavor = "current_thread")]
async fn a_restarted_server_disowns_the_connections_of_its_former_life() {
    let ca = cluster(1);
    let (server, client) = (credentials(&ca, STORAGE), bind(credentials(&ca, CLIENT)));
    let process = Process::start(([127, 0, 0, 1], 0).into(), server.clone(), Arc::new(Echo));
    let to = Endpoint { address: process.address, name: STORAGE };
    client.call(to, frame(b"", &[]), LONG).await.unwrap();
    process.kill();
    let process = Process::start(to.address, server, Arc::new(Echo));
    let result = timeout(AT_ONCE, client.call(to, frame(b"", &[]), LONG)).await.unwrap();
    assert!(matches!(result, Err(CallError::Lost(..))), "{result:?}");
    timeout(AT_ONCE, client.call(to, frame(b"", &[]), LONG)).await.unwrap().unwrap();
    process.kill();
}

#[tokio::test(flavor = "current_thread")]
async fn a_closing_server_says_so_and_its_serving_ends() {
    let ca = cluster(1);
    let server = bind(credentials(&ca, STORAGE));
    let serving = start(&server, Arc::new(Echo));
    let client = bind(credentials(&ca, CLIENT));
    let to = endpoint(&server, STORAGE);
    client.call(to, frame(b"", &[]), LONG).await.unwrap();
    server.close();
    server.closed().await;
    serving.await.unwrap();
    let result = timeout(AT_ONCE, client.call(to, frame(b"", &[]), LONG)).await.unwrap();
    assert!(matches!(result, Err(CallError::Lost(..) | CallError::Connect(..))), "{result:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_request_that_has_begun_ends_though_its_caller_has_gone() {
    let slow = Arc::<Slow>::default();
    let Pair { client, to, server: _server } = pair(slow.clone(), NetOptions::default());
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.call(to, frame(b"", &[]), LONG).await }
    });
    slow.begun.notified().await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    slow.go_on.notify_one();
    timeout(LONG, slow.done.notified()).await.unwrap();
    assert_eq!(slow.finished.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "current_thread")]
async fn requests_beyond_the_bound_wait_for_a_place() {
    let slow = Arc::<Slow>::default();
    let options = NetOptions { requests_max: 2, ..NetOptions::default() };
    let Pair { client, to, server: _server } = pair(slow.clone(), options);
    let call = |deadline| {
        let client = client.clone();
        tokio::spawn(async move { client.call(to, frame(b"", &[]), deadline).await })
    };
    let served = [call(LONG), call(LONG)];
    for _ in &served {
        slow.begun.notified().await;
    }
    let turned_away = call(Duration::from_millis(300)).await.unwrap();
    assert!(matches!(turned_away, Err(CallError::Deadline(..))), "{turned_away:?}");
    assert!(timeout(Duration::from_millis(10), slow.begun.notified()).await.is_err(), "a third request was begun");
    slow.go_on.notify_one();
    slow.done.notified().await;
    slow.go_on.notify_one();
    for call in served {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_address_in_use_is_one_sentence() {
    let ca = cluster(1);
    let first = bind(credentials(&ca, STORAGE));
    let address = first.local_address().unwrap();
    let error = Node::bind(address, credentials(&ca, META), NetOptions::default()).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)));
    assert_eq!(error.to_string(), format!("the address {address} is in use by another process"));
}

/// A metadata server that knows one token.
struct Register {
    ca: Ca,
    unused: std::sync::Mutex<Option<[u8; 32]>>,
}

impl Register {
    fn certify(&self, request: &EnrolRequest) -> Result<Enrolled, Refusal> {
        let mut unused = self.unused.lock().unwrap();
        if *unused != Some(request.secret) {
            return Err(Refusal::BadToken);
        }
        let certificate = self.ca.issue(CLIENT, &request.csr, now(), NODE_VALIDITY).map_err(|_| Refusal::BadRequest)?;
        *unused = None;
        let ca = self.ca.certificate().to_vec();
        Ok(Enrolled { cluster: self.ca.cluster(), role: CLIENT.role, id: CLIENT.id, certificate, ca })
    }
}

impl Enrol for Register {
    fn enrol(self: Arc<Self>, request: EnrolRequest) -> BoxFuture<'static, EnrolReply> {
        Box::pin(async move { EnrolReply(self.certify(&request)) })
    }
}

fn registering_server(as_node: NodeName) -> (Arc<Node>, Token) {
    let ca = cluster(1);
    let server = bind(credentials(&ca, as_node));
    let token = Token {
        cluster: ca.cluster(),
        fingerprint: ca.fingerprint(),
        secret: [9; 32],
        address: server.local_address().unwrap(),
    };
    let register = Register { ca, unused: std::sync::Mutex::new(Some(token.secret)) };
    tokio::spawn(server.serve(Arc::new(Echo), Some(Arc::new(register))).unwrap());
    (server, token)
}

#[tokio::test(flavor = "current_thread")]
async fn a_token_becomes_a_certificate_once() {
    let (server, token) = registering_server(META);
    let options = NetOptions::default();
    let wrong = Token { secret: [8; 32], ..token.clone() };
    assert!(matches!(enrol(&wrong, &options).await, Err(EnrolError::Refused(Refusal::BadToken))));
    let enrolled = enrol(&token, &options).await.unwrap();
    assert_eq!(enrolled.node, CLIENT);
    let reply = bind(enrolled).call(endpoint(&server, META), frame(b"hi", &[]), LONG).await.unwrap();
    assert_eq!(reply.header, b"3.client said hi");
    assert!(matches!(enrol(&token, &options).await, Err(EnrolError::Refused(Refusal::BadToken))));
}

#[tokio::test(flavor = "current_thread")]
async fn a_newcomer_gives_its_secret_to_nobody_but_the_tokens_metadata_server() {
    let (_server, token) = registering_server(META);
    let (_storage, storage_token) = registering_server(STORAGE);
    let cases = [
        ("another CA", Token { fingerprint: cluster(1).fingerprint(), ..token.clone() }),
        ("another cluster", Token { cluster: ClusterId([2; 16]), ..token }),
        ("a storage server", storage_token),
    ];
    for (what, token) in cases {
        let result = enrol(&token, &NetOptions::default()).await;
        assert!(matches!(result, Err(EnrolError::Connect(CallError::Untrusted(..)))), "{what}: {result:?}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_node_that_enrols_nobody_refuses_a_token() {
    let ca = cluster(1);
    let server = bind(credentials(&ca, META));
    start(&server, Arc::new(Echo));
    let address = server.local_address().unwrap();
    let token = Token { cluster: ca.cluster(), fingerprint: ca.fingerprint(), secret: [0; 32], address };
    let result = enrol(&token, &NetOptions::default()).await;
    assert!(matches!(result, Err(EnrolError::Connect(_))), "{result:?}");
}

#[test]
fn credentials_survive_their_files_and_an_exposed_key_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let ca = cluster(1);
    ca.save(directory.path()).unwrap();
    let loaded = Ca::load(directory.path()).unwrap();
    assert_eq!((loaded.cluster(), loaded.fingerprint()), (ca.cluster(), ca.fingerprint()));
    let issued = credentials(&loaded, STORAGE);
    issued.check(now()).unwrap();
    issued.save(directory.path()).unwrap();
    let read = Credentials::load(directory.path()).unwrap();
    assert_eq!(read.identity(), issued.identity());
    read.client_config().unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4, "no temporary file stays");

    for key in ["node.key", "ca.key"] {
        let path = directory.path().join(key);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    let error = Credentials::load(directory.path()).unwrap_err();
    assert!(matches!(error, TlsError::Exposed { mode: 0o640, .. }), "{error}");
    assert!(error.to_string().contains("chmod 600"), "{error}");
    assert!(matches!(Ca::load(directory.path()), Err(TlsError::Exposed { .. })));
}

#[test]
fn credentials_that_do_not_fit_together_are_refused() {
    let (ours, foreign) = (cluster(1), cluster(2));
    let key = NodeKey::generate().unwrap();
    let certificate = ours.issue(STORAGE, &key.csr().unwrap(), now(), NODE_VALIDITY).unwrap();
    let mixed = Credentials::new(key, certificate.clone(), foreign.certificate().to_vec());
    assert!(matches!(mixed, Err(TlsError::OtherCluster { .. })));
    let other_key = Credentials::new(NodeKey::generate().unwrap(), certificate, ours.certificate().to_vec()).unwrap();
    assert!(matches!(other_key.client_config(), Err(TlsError::Setup(_))));
    let key = NodeKey::generate().unwrap();
    assert!(Credentials::new(key, b"no certificate".to_vec(), ours.certificate().to_vec()).is_err());
    assert!(ours.issue(STORAGE, b"no request", now(), NODE_VALIDITY).is_err());
}

fn token(address: &str) -> Token {
    let address = address.parse().unwrap();
    Token { cluster: ClusterId([1; 16]), fingerprint: Fingerprint([2; 32]), secret: [3; 32], address }
}

#[test]
fn a_token_survives_being_written_down() {
    for address in
        ["127.0.0.1:1", "255.255.255.255:65535", "[::1]:7400", "[fe80::ffff:ffff:ffff:ffff%4294967295]:65535"]
    {
        let token = token(address);
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()), "{text}");
        assert_eq!(format!(" {text}\n").parse(), Ok(token));
    }
    assert!(!format!("{:?}", token("127.0.0.1:1")).contains("3, 3"), "a secret is not for logs");
}

#[test]
fn a_damaged_token_is_told_from_no_token() {
    let text = token("127.0.0.1:7400").to_string();
    let wrong_letter = text.replacen("aea", "aeb", 1);
    for (bad, expected) in [
        ("", TokenError::Prefix),
        ("hft2.abc", TokenError::Prefix),
        ("hft1.", TokenError::Damaged),
        ("hft1.a!b", TokenError::Character),
        ("hft1.ä", TokenError::Character),
        (&text[..text.len() - 3], TokenError::Damaged),
        (&wrong_letter, TokenError::Damaged),
        (&format!("{text}{}", "a".repeat(10_000)), TokenError::Damaged),
    ] {
        assert_eq!(bad.parse::<Token>(), Err(expected), "{bad}");
    }
}

proptest! {
    #[test]
    fn tokens_round_trip(cluster: [u8; 16], fingerprint: [u8; 32], secret: [u8; 32], address: SocketAddr) {
        let token = Token { cluster: ClusterId(cluster), fingerprint: Fingerprint(fingerprint), secret, address };
        prop_assert_eq!(token.to_string().parse::<Token>().unwrap().to_string(), token.to_string());
    }

    #[test]
    fn no_text_makes_the_token_parser_panic(text in ".{0,300}", digits in "[a-z2-7]{0,260}") {
        prop_assert!(text.parse::<Token>().is_err());
        let token = format!("hft1.{digits}");
        prop_assert!(token.parse::<Token>().is_err());
    }
}
