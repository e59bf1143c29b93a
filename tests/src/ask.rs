//! Requests to the servers of a real cluster without a client between: under any certificate, one at a time.

use std::time::Duration;

use holdfast_common::{
    Time,
    clock::{Clock, SystemClock},
    net::{
        CallError, Endpoint, Frame, Peers,
        identity::{NodeName, Role},
        quic::{NetOptions, Node},
        tls::{Ca, Credentials, NODE_VALIDITY},
    },
    wire::{
        codec::{decode, encode},
        meta::{AdminRequest, MetaAnswer, MetaReply, MetaRequest},
        storage::{StorageReply, StorageRequest},
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::cluster::Cluster;

const DEADLINE: Duration = Duration::from_secs(20);

pub fn now() -> Time {
    SystemClock::default().now()
}

impl Cluster {
    /// Credentials that the cluster's own CA signs now, good for as long as usual.
    pub fn issue(&self, role: Role) -> Credentials {
        self.issue_at(role, now(), NODE_VALIDITY)
    }

    pub fn issue_at(&self, role: Role, from: Time, validity: Duration) -> Credentials {
        let ca = Ca::load(&self.path().join("ca")).expect("a local cluster has its CA");
        ca.issue_credentials(NodeName { role, id: 99 }, from, validity).expect("the CA signs")
    }

    pub fn ask_meta(&self, credentials: Credentials, request: &MetaRequest) -> Result<MetaReply, CallError> {
        ask(credentials, &self.get("client.toml", "meta"), NodeName { role: Role::Meta, id: 1 }, request)
    }

    /// Asks storage server 1.
    pub fn ask_storage(&self, credentials: Credentials, request: &StorageRequest) -> Result<StorageReply, CallError> {
        let address = self.get("storage-1/storage.toml", "listen");
        ask(credentials, &address, NodeName { role: Role::Storage, id: 1 }, request)
    }

    /// What the metadata server finds wrong with its own invariants; empty when all hold.
    pub fn violations(&self) -> Vec<String> {
        let reply = self.ask_meta(self.issue(Role::Admin), &MetaRequest::Admin(AdminRequest::Check));
        match reply.expect("the metadata server answers").result {
            Ok(MetaAnswer::Violations(sentences)) => sentences,
            other => panic!("the check was answered with {other:?}"),
        }
    }
}

fn ask<T: DeserializeOwned>(
    credentials: Credentials,
    address: &str,
    name: NodeName,
    request: &impl Serialize,
) -> Result<T, CallError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = runtime.block_on(async {
        let node = Node::bind(([127, 0, 0, 1], 0).into(), credentials, NetOptions::default()).expect("a free port");
        let to = Endpoint { address: address.parse().expect("an address"), name };
        let frame = Frame { header: encode(request).expect("a short request"), payload: Vec::new() };
        node.call(to, frame, DEADLINE).await
    })?;
    Ok(decode(&answer.header).expect("an answer that decodes"))
}
