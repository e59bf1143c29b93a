//! Enrolment: a token, carried by a person, becomes a certificate.
//!
//! The token pins the cluster's CA by its fingerprint, so the newcomer knows whom it talks to before it has
//! anything of the cluster; its secret proves the newcomer, once.

use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use quinn::{Connection, Runtime, TokioRuntime};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::time::timeout;

use super::{
    BoxFuture, CallError, Frame,
    call::connect_error,
    frame::{self, FrameError, FrameLimits, ResetOnDrop},
    identity::{NodeName, PeerIdentity, Role},
    quic::{BindError, CODE_CLOSING, NetOptions, client_config, new_endpoint},
    socket,
    tls::{
        Credentials, Fingerprint, NodeKey, TlsError, certificate_identity, client_builder, provider, verify_chain_at,
    },
};
use crate::{
    clock::{Clock, SystemClock},
    refusal::Refusal,
    types::ClusterId,
    wire::{
        ALPN_ENROL,
        codec::{CodecError, decode, encode},
        enrol::{EnrolReply, EnrolRequest},
    },
};

/// The whole conversation, on both sides.
const CONVERSATION_TIMEOUT: Duration = Duration::from_secs(10);
const TOKEN_PREFIX: &str = "hft1.";
const TOKEN_FIXED_SIZE: usize = 16 + 32 + 32;
const TOKEN_CHECKSUM_SIZE: usize = 4;
/// Bytes of an address as text: IPv6 with scope and port.
const TOKEN_ADDRESS_MAX: usize = 64;

/// What `holdfast token` prints: where to enrol, whom to trust there, and the right to do it once.
///
/// As text `hft1.` and base32 of cluster (16 bytes), CA fingerprint (32), secret (32), address as text, and the first 4 bytes
/// of the BLAKE3 of all that, which tells a mistyped token from a used one.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub cluster: ClusterId,
    pub fingerprint: Fingerprint,
    pub secret: [u8; 32],
    /// Of the metadata server.
    pub address: SocketAddr,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("cluster", &self.cluster).field("address", &self.address).finish_non_exhaustive()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(TOKEN_FIXED_SIZE + TOKEN_ADDRESS_MAX);
        bytes.extend_from_slice(&self.cluster.0);
        bytes.extend_from_slice(&self.fingerprint.0);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(self.address.to_string().as_bytes());
        let checksum = token_checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        write!(f, "{TOKEN_PREFIX}{}", base32::encode(&bytes))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is no enrolment token: one begins with \"hft1.\", as `holdfast token` prints it")]
    Prefix,
    #[error("the token has a character that no token has; copy it again, whole")]
    Character,
    #[error("the token is cut off or mistyped; copy it again, whole")]
    Damaged,
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(TOKEN_PREFIX).ok_or(TokenError::Prefix)?;
        if digits.len() > 2 * (TOKEN_FIXED_SIZE + TOKEN_ADDRESS_MAX + TOKEN_CHECKSUM_SIZE) {
            return Err(TokenError::Damaged);
        }
        let bytes = base32::decode(digits).ok_or(TokenError::Character)?;
        parse_token(&bytes).ok_or(TokenError::Damaged)
    }
}

fn parse_token(bytes: &[u8]) -> Option<Token> {
    let (body, checksum) = bytes.split_last_chunk::<TOKEN_CHECKSUM_SIZE>()?;
    if token_checksum(body) != *checksum {
        return None;
    }
    let (cluster, rest) = body.split_first_chunk()?;
    let (fingerprint, rest) = rest.split_first_chunk()?;
    let (secret, address) = rest.split_first_chunk()?;
    let address = std::str::from_utf8(address).ok()?.parse().ok()?;
    Some(Token { cluster: ClusterId(*cluster), fingerprint: Fingerprint(*fingerprint), secret: *secret, address })
}

fn token_checksum(body: &[u8]) -> [u8; TOKEN_CHECKSUM_SIZE] {
    let [a, b, c, d, ..] = *blake3::hash(body).as_bytes();
    [a, b, c, d]
}

/// RFC 4648, lower case, no padding: one word under a double click.
mod base32 {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

    pub(super) fn encode(bytes: &[u8]) -> String {
        let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
        let (mut word, mut bits) = (0u32, 0);
        for byte in bytes {
            word = (word << 8) | u32::from(*byte);
            bits += 8;
            while bits >= 5 {
                bits -= 5;
                text.push(digit(word >> bits));
            }
            word &= (1 << bits) - 1;
        }
        if bits > 0 {
            text.push(digit(word << (5 - bits)));
        }
        text
    }

    fn digit(value: u32) -> char {
        char::from(ALPHABET[(value & 31) as usize])
    }

    pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
        let (mut word, mut bits) = (0u32, 0);
        for character in text.bytes() {
            let value = ALPHABET.iter().position(|known| *known == character.to_ascii_lowercase())?;
            word = (word << 5) | u32::try_from(value).ok()?;
            bits += 5;
            if bits >= 8 {
                bits -= 8;
                bytes.push(u8::try_from(word >> bits).ok()?);
                word &= (1 << bits) - 1;
            }
        }
        Some(bytes)
    }
}

/// The metadata server's side: turns a secret into a certificate, once.
pub trait Enrol: Send + Sync + 'static {
    fn enrol(self: Arc<Self>, request: EnrolRequest) -> BoxFuture<'static, EnrolReply>;
}

/// One request, one answer, from somebody without a certificate.
pub(super) async fn answer(service: Arc<dyn Enrol>, connection: &Connection, address: SocketAddr) {
    connection.set_max_concurrent_bi_streams(1u32.into());
    connection.set_receive_window((64u32 << 10).into());
    match timeout(CONVERSATION_TIMEOUT, answer_one(service, connection)).await {
        Ok(Ok(Ok(node))) => tracing::info!(peer = %address, %node, "a node was enrolled"),
        Ok(Ok(Err(refusal))) => tracing::warn!(peer = %address, %refusal, "an enrolment is refused"),
        Ok(Err(error)) => tracing::warn!(peer = %address, error = %error, "an enrolment failed"),
        Err(_) => tracing::warn!(peer = %address, "an enrolment was not complete in time"),
    }
    connection.close(CODE_CLOSING, b"done");
}

async fn answer_one(
    service: Arc<dyn Enrol>,
    connection: &Connection,
) -> Result<Result<NodeName, Refusal>, ConversationError> {
    let (send, mut recv) = connection.accept_bi().await.map_err(FrameError::from)?;
    let mut send = ResetOnDrop::new(send);
    let (request, _) = frame::read(&mut recv, FrameLimits::ENROL, None).await?;
    let reply = service.enrol(decode(&request.header)?).await;
    let outcome = match &reply.0 {
        Ok(enrolled) => Ok(NodeName { role: enrolled.role, id: enrolled.id }),
        Err(refusal) => Err(*refusal),
    };
    let reply = Frame { header: encode(&reply)?, payload: Vec::new() };
    frame::write(&mut send.stream, reply, FrameLimits::ENROL).await?;
    send.disarm();
    // The newcomer closes when it has the answer; closing first could overtake it.
    connection.closed().await;
    Ok(outcome)
}

#[derive(Debug, thiserror::Error)]
enum ConversationError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Why a token did not become a certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("the metadata server cannot be reached: {0}")]
    Connect(CallError),
    #[error("the metadata server refuses: {0}")]
    Refused(Refusal),
    #[error("the metadata server at {0} ended the conversation: {1}")]
    Broken(SocketAddr, String),
    #[error("the metadata server at {0} did not answer within {1:?}")]
    Deadline(SocketAddr, Duration),
    #[error("the metadata server at {0} sent a certificate that is not what the token promises: {1}")]
    Certificate(SocketAddr, String),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Makes a key, and has the metadata server that `token` names certify it. The token is used up. Nothing is written.
pub async fn enrol(token: &Token, options: &NetOptions) -> Result<Credentials, EnrolError> {
    match timeout(CONVERSATION_TIMEOUT, converse(token, options)).await {
        Ok(result) => result,
        Err(_) => Err(EnrolError::Deadline(token.address, CONVERSATION_TIMEOUT)),
    }
}

async fn converse(token: &Token, options: &NetOptions) -> Result<Credentials, EnrolError> {
    let key = NodeKey::generate()?;
    let request = EnrolRequest { secret: token.secret, csr: key.csr()? };
    let endpoint = calling_endpoint(token.address, options)?;
    let connection = connect(&endpoint, token, options).await.map_err(EnrolError::Connect)?;
    let reply = ask(&connection, &request).await.map_err(|e| EnrolError::Broken(token.address, e.to_string()));
    connection.close(CODE_CLOSING, b"done");
    endpoint.wait_idle().await;
    let enrolled = reply?.0.map_err(EnrolError::Refused)?;
    let expected = PeerIdentity { cluster: token.cluster, node: NodeName { role: enrolled.role, id: enrolled.id } };
    if Fingerprint::of(&enrolled.ca) != token.fingerprint {
        return Err(EnrolError::Certificate(token.address, "its CA has another fingerprint".into()));
    }
    let credentials = Credentials::new(key, enrolled.certificate, enrolled.ca)?;
    verify(&credentials, expected).map_err(|reason| EnrolError::Certificate(token.address, reason))?;
    Ok(credentials)
}

fn verify(credentials: &Credentials, expected: PeerIdentity) -> Result<(), String> {
    if credentials.identity() != expected {
        return Err(format!("it names {}", credentials.identity().dns_name()));
    }
    credentials.check(SystemClock::default().now()).map_err(|e| e.to_string())?;
    // Compares the certificate's key with ours.
    credentials.client_config().map(drop).map_err(|e| e.to_string())
}

fn calling_endpoint(to: SocketAddr, options: &NetOptions) -> Result<quinn::Endpoint, BindError> {
    let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let address = SocketAddr::new(any, 0);
    let failed = |source: io::Error| BindError::Socket { address, source };
    let socket = socket::bind(address, 1 << 20).map_err(failed)?;
    let runtime = Arc::new(TokioRuntime);
    new_endpoint(runtime.wrap_udp_socket(socket).map_err(failed)?, runtime, None, options)
}

async fn connect(endpoint: &quinn::Endpoint, token: &Token, options: &NetOptions) -> Result<Connection, CallError> {
    let address = token.address;
    let failed = |reason: String| CallError::Connect(address, reason);
    let config = pinned_config(token)
        .and_then(|tls| client_config(tls, options, address.ip().is_loopback()))
        .map_err(|e| failed(e.to_string()))?;
    // The name is not compared: the verifier takes any metadata server of the token's cluster.
    let name = PeerIdentity { cluster: token.cluster, node: NodeName { role: Role::Meta, id: 0 } }.dns_name();
    let connecting = endpoint.connect_with(config, address, &name).map_err(|e| failed(e.to_string()))?;
    tokio::select! {
        result = connecting => result.map_err(|error| connect_error(address, error)),
        reason = socket::refused(address), if options.ask_kernel => Err(failed(reason)),
    }
}

async fn ask(connection: &Connection, request: &EnrolRequest) -> Result<EnrolReply, ConversationError> {
    let (send, mut recv) = connection.open_bi().await.map_err(FrameError::from)?;
    let mut send = ResetOnDrop::new(send);
    let request = Frame { header: encode(request)?, payload: Vec::new() };
    frame::write(&mut send.stream, request, FrameLimits::ENROL).await?;
    let (reply, _) = frame::read(&mut recv, FrameLimits::ENROL, None).await?;
    send.disarm();
    Ok(decode(&reply.header)?)
}

fn pinned_config(token: &Token) -> Result<rustls::ClientConfig, TlsError> {
    let verifier = PinnedCa { cluster: token.cluster, fingerprint: token.fingerprint };
    let mut config = client_builder(Arc::new(verifier))?.with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    Ok(config)
}

/// Trusts the metadata servers of one cluster, whose CA it knows by fingerprint: the server sends the CA along.
#[derive(Debug)]
struct PinnedCa {
    cluster: ClusterId,
    fingerprint: Fingerprint,
}

impl PinnedCa {
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), String> {
        let ca = others.iter().find(|other| Fingerprint::of(other) == self.fingerprint);
        let ca = ca.ok_or("the server does not belong to the cluster that the token is for")?;
        verify_chain_at(certificate, ca, now).map_err(|e| e.to_string())?;
        let identity = certificate_identity(certificate).map_err(|e| e.to_string())?;
        if identity.cluster != self.cluster || identity.node.role != Role::Meta {
            return Err(format!("{} is no metadata server of the token's cluster", identity.dns_name()));
        }
        Ok(())
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.check(end_entity, intermediates, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            // "General" is the kind whose text arrives at the person with the token.
            Err(reason) => Err(rustls::Error::General(reason)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
