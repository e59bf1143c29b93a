//! The cluster map: which storage servers there are, and whether they can be used. Pure.

use serde::{Deserialize, Serialize};

use crate::types::{Replicas, ServerId, Time};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerState {
    /// It is heard, and what it has is not yet compared with what it is on record for. Takes part like one that is up.
    Joining,
    Up,
    /// Heartbeats are late. Still tried for reads; new blocks go elsewhere when they can.
    Suspect,
    Down,
    /// It works, and is being emptied: its copies are read, new ones go elsewhere.
    Draining,
    /// It may be away for a while: its copies count, new ones go elsewhere.
    Maintenance,
}

impl ServerState {
    /// Does it answer and take part?
    pub fn is_up(self) -> bool {
        matches!(self, Self::Joining | Self::Up)
    }
}

/// What the operator wants of a storage server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// It takes new blocks, and is replaced when it stays away.
    #[default]
    Serving,
    /// It is to be emptied: its copies do not count, and go when there are enough others.
    Draining,
    /// Until then it may be away without being replaced.
    Maintenance { until: Time },
    /// As `Draining`, and `Removed` when it is empty.
    Leaving,
    /// It does not belong to the cluster any more, and is not let in again under its number.
    Removed,
}

impl Standing {
    /// Is it to be emptied?
    pub fn is_leaving(self) -> bool {
        matches!(self, Self::Draining | Self::Leaving)
    }
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Maintenance { .. } => "maintenance",
            Self::Leaving => "leaving",
            Self::Removed => "removed",
        })
    }
}

impl std::fmt::Display for ServerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Joining => "joining",
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Maintenance => "maintenance",
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
    /// Of the blocks of files that have no number of their own.
    pub replicas: Replicas,
}

impl ClusterMap {
    pub fn server(&self, id: ServerId) -> Option<&ServerInfo> {
        self.servers.iter().find(|server| server.id == id)
    }
}
