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
