//! Turning a one-time token into a certificate.

use serde::{Deserialize, Serialize};

use crate::{net::identity::Role, refusal::Refusal, types::ClusterId};

/// Sent on a connection of `ALPN_ENROL`, where the client has checked the server's certificate
/// against the CA fingerprint in its token, and has none of its own yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// 32 random bytes from the token. Good once.
    pub secret: [u8; 32],
    /// Certificate signing request, DER. Its subject is ignored: the token decides role and id.
    pub csr: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    pub cluster: ClusterId,
    pub role: Role,
    /// Chosen by the metadata server, counted per role from 1.
    pub id: u32,
    /// DER.
    pub certificate: Vec<u8>,
    /// DER, whose fingerprint is in the token.
    pub ca: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolReply(pub Result<Enrolled, Refusal>);
