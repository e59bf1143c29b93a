//! What travels between Holdfast's processes. Pure.
//!
//! One request is one bidirectional QUIC stream: a header (bincode, bounded, see [`codec`]), then
//! raw payload bytes that meet no serialiser. The answer has the same shape. Variants are numbered
//! by their place: new ones go to the end, and `tests` holds golden bytes of every one.

pub mod codec;
pub mod enrol;
pub mod meta;
pub mod storage;

/// Negotiated in TLS: service and version. Another version is another name.
pub const ALPN: &[u8] = b"holdfast/8";
/// The one conversation that needs no certificate: a token against a certificate.
pub const ALPN_ENROL: &[u8] = b"holdfast-enrol/1";
