//! Who a process is: cluster, role and number, as its certificate says. Pure.

use serde::{Deserialize, Serialize};

use crate::types::ClusterId;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    Meta,
    Storage,
    Client,
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Storage => "storage",
            Self::Client => "client",
            Self::Admin => "admin",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Meta, Self::Storage, Self::Client, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no role: meta, storage, client or admin"))
    }
}

/// Role and number within the cluster: `3.storage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeName {
    pub role: Role,
    pub id: u32,
}

impl std::fmt::Display for NodeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.id, self.role)
    }
}

/// What a certificate of the cluster's CA proves. In the certificate it is one DNS name:
/// `<id>.<role>.<cluster as 32 hex digits>.holdfast`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerIdentity {
    pub cluster: ClusterId,
    pub node: NodeName,
}

impl PeerIdentity {
    pub fn dns_name(&self) -> String {
        format!("{}.{}.{}.holdfast", self.node.id, self.node.role, self.cluster)
    }

    /// `None` for any other form of name.
    pub fn from_dns_name(name: &str) -> Option<Self> {
        let mut labels = name.split('.');
        let id = labels.next()?.parse().ok()?;
        let role = labels.next()?.parse().ok()?;
        let cluster = parse_cluster(labels.next()?)?;
        let identity = Self { cluster, node: NodeName { role, id } };
        // One name for one node: "+7" and "007" parse as numbers, too.
        (identity.dns_name() == name).then_some(identity)
    }
}

/// 32 hexadecimal digits.
pub fn parse_cluster(text: &str) -> Option<ClusterId> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(ClusterId(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_dns_name_and_nothing_else_parses() {
        let identity = PeerIdentity { cluster: ClusterId([0xab; 16]), node: NodeName { role: Role::Storage, id: 7 } };
        let name = identity.dns_name();
        assert_eq!(name, "7.storage.abababababababababababababababab.holdfast");
        assert_eq!(PeerIdentity::from_dns_name(&name), Some(identity));
        for bad in ["", "7", "7.storage", "x.storage.ab.holdfast", "7.root.abababababababababababababababab.holdfast"] {
            assert_eq!(PeerIdentity::from_dns_name(bad), None, "{bad}");
        }
        for bad in [format!("{name}.evil"), format!("+{name}"), format!("0{name}"), name.to_uppercase()] {
            assert_eq!(PeerIdentity::from_dns_name(&bad), None, "{bad}");
        }
    }
}
