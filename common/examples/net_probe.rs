//! Measures the transport on loopback: latency of small requests, throughput of 1 MiB puts and gets.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use holdfast_common::{
    clock::{Clock, SystemClock},
    net::{
        BoxFuture, Endpoint, Frame, Peers, Serve,
        identity::{NodeName, PeerIdentity, Role},
        quic::{NetOptions, Node},
        tls::{Ca, Credentials, NODE_VALIDITY},
    },
    types::ClusterId,
};

const SERVER: NodeName = NodeName { role: Role::Storage, id: 1 };
const CLIENT: NodeName = NodeName { role: Role::Client, id: 1 };
const MEBIBYTE: usize = 1 << 20;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Gives `header[0]` mebibytes back.
struct Blocks(Bytes);

impl Serve for Blocks {
    fn serve(self: Arc<Self>, _from: PeerIdentity, request: Frame) -> BoxFuture<'static, Frame> {
        let count = usize::from(request.header.first().copied().unwrap_or(0));
        let payload = vec![self.0.clone(); count];
        Box::pin(async move { Frame { header: Vec::new(), payload } })
    }
}

fn main() -> Outcome {
    let ca = Ca::create(ClusterId(rand::random()), SystemClock::default().now())?;
    let issue = |node| ca.issue_credentials(node, SystemClock::default().now(), NODE_VALIDITY);
    let to = start_server(issue(SERVER)?)?;
    runtime()?.block_on(measure(issue(CLIENT)?, to))
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn start_server(credentials: Credentials) -> Outcome<Endpoint> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || -> Result<(), String> {
        let runtime = runtime().map_err(|e| e.to_string())?;
        runtime.block_on(async {
            let options = NetOptions::default();
            let node = Node::bind(([127, 0, 0, 1], 0).into(), credentials, options).map_err(|e| e.to_string())?;
            tell.send(node.local_address().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
            node.serve(Arc::new(Blocks(vec![1; MEBIBYTE].into())), None).map_err(|e| e.to_string())?.await;
            Ok(())
        })
    });
    Ok(Endpoint { address: told.recv()?, name: SERVER })
}

async fn measure(credentials: Credentials, to: Endpoint) -> Outcome {
    let node = Node::bind(([127, 0, 0, 1], 0).into(), credentials, NetOptions::default())?;
    let begun = Instant::now();
    call(&node, to, 0, Vec::new()).await?;
    println!("connect and first answer   {:>8.0} us", begun.elapsed().as_secs_f64() * 1e6);
    latency(&node, to).await?;
    for in_flight in [32, 128] {
        let rate = rate(&node, to, in_flight, 100_000, 0, Bytes::new()).await?;
        println!("small, {in_flight:>3} in flight       {:>8.1} k/s", rate / 1e3);
    }
    let block = Bytes::from(vec![2; MEBIBYTE]);
    for in_flight in [1, 4, 16] {
        for round in 0..3 {
            let put = rate(&node, to, in_flight, 2000, 0, block.clone()).await?;
            let get = rate(&node, to, in_flight, 2000, 1, Bytes::new()).await?;
            println!("1 MiB, {in_flight:>2} in flight, {round}:  put {:>6.0} MB/s  get {:>6.0} MB/s", mb(put), mb(get));
        }
    }
    Ok(())
}

fn mb(blocks_per_second: f64) -> f64 {
    blocks_per_second * 1.048_576
}

async fn call(node: &Node, to: Endpoint, blocks: u8, payload: Vec<Bytes>) -> Outcome {
    let request = Frame { header: vec![blocks], payload };
    node.call(to, request, Duration::from_secs(30)).await?;
    Ok(())
}

async fn latency(node: &Node, to: Endpoint) -> Outcome {
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let begun = Instant::now();
        call(node, to, 0, Vec::new()).await?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times[times.len() * share / 100];
    println!("small, one at a time       p50 {:.0} us, p99 {:.0} us", at(50), at(99));
    Ok(())
}

/// Calls a second, with `in_flight` at once.
async fn rate(node: &Arc<Node>, to: Endpoint, in_flight: usize, total: usize, blocks: u8, put: Bytes) -> Outcome<f64> {
    let begun = Instant::now();
    let workers: Vec<_> = (0..in_flight)
        .map(|_| {
            let (node, put) = (node.clone(), put.clone());
            tokio::spawn(async move {
                for _ in 0..total / in_flight {
                    let payload = if put.is_empty() { Vec::new() } else { vec![put.clone()] };
                    call(&node, to, blocks, payload).await.map_err(|e| e.to_string())?;
                }
                Ok::<(), String>(())
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
    let calls = (total / in_flight * in_flight) as f64;
    Ok(calls / begun.elapsed().as_secs_f64())
}
