//! The cluster map: which storage servers there are, and whether they can be used. Pure.

use serde::{Deserialize, Serialize};

use crate::types::ServerId;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerState {
    /// Enrolled, not yet heard of.
    Joining,
    Up,
    /// Heartbeats are late. Still tried for reads; new blocks go elsewhere when they can.
    Suspect,
    Down,
}

impl std::fmt::Display for ServerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Joining => "joining",
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerInfo {
    pub id: ServerId,
    /// `ip:port` of its QUIC endpoint.
    pub address: std::net::SocketAddr,
    /// Failure domain: copies go to distinct ones first. Empty: each server its own.
    pub zone: String,
    pub state: ServerState,
    /// Share of new blocks relative to others: 0 (none) to 1,000,000.
    pub weight: u32,
}

impl ServerInfo {
    /// A server for tests.
    #[doc(hidden)]
    pub fn example() -> Self {
        Self {
            id: ServerId(1),
            address: ([127, 0, 0, 1], 1).into(),
            zone: String::new(),
            state: ServerState::Up,
            weight: 100,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMap {
    /// Grows with every change.
    pub version: u64,
    /// Sorted by id.
    pub servers: Vec<ServerInfo>,
}

impl ClusterMap {
    pub fn server(&self, id: ServerId) -> Option<&ServerInfo> {
        self.servers.iter().find(|server| server.id == id)
    }
}
