//! Certificates of a cluster: its authority, a node's own, and the checks that both ends of a connection make.
//!
//! TLS 1.3 and mutual, always. The cluster's CA is the only root, there is no revocation and no resumption (a
//! resumed session would skip the check of the certificate), and who a peer is stands in its one DNS name.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, SerialNumber,
};
use rustls::{
    RootCertStore,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject,
    },
    server::WebPkiClientVerifier,
    version::TLS13,
};
use time::OffsetDateTime;

use super::identity::{NodeName, PeerIdentity, parse_cluster};
use crate::{
    types::{ClusterId, Time},
    wire::{ALPN, ALPN_ENROL},
};

/// How long a cluster's CA is good: 30 years, because nothing renews it.
const CA_VALIDITY: Duration = Duration::from_secs(30 * 365 * 86_400);
/// How long a node's certificate is good if nobody says otherwise: 5 years.
pub const NODE_VALIDITY: Duration = Duration::from_secs(5 * 365 * 86_400);
/// A certificate is valid from this long before it was made, so that nodes whose clocks differ accept it.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

const CA_CERTIFICATE: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const NODE_CERTIFICATE: &str = "node.crt";
const NODE_KEY: &str = "node.key";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} cannot be written")]
    Write { path: PathBuf, source: io::Error },
    #[error("the key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{path} is not the PEM file it should be: {reason}")]
    Pem { path: PathBuf, reason: String },
    #[error("the certificate does not name a node of a Holdfast cluster: {0}")]
    Name(String),
    #[error("the certificate names {node} of cluster {found}, but the CA is that of cluster {expected}")]
    OtherCluster { node: NodeName, found: ClusterId, expected: ClusterId },
    #[error("the certificate cannot be made: {0}")]
    Issue(rcgen::Error),
    #[error("the certificate signing request is refused: {0}")]
    Request(rcgen::Error),
    #[error("the certificate, its key and the CA do not fit together: {0}")]
    Setup(String),
}

/// BLAKE3 of the DER of a cluster's CA certificate: what a token pins.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub fn of(ca: &[u8]) -> Self {
        Self(*blake3::hash(ca).as_bytes())
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// The certificate authority of one cluster: who holds it can make any node.
pub struct Ca {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Ca {
    /// A new authority for `cluster`, valid from `now` for 30 years.
    pub fn create(cluster: ClusterId, now: Time) -> Result<Self, TlsError> {
        let mut params = CertificateParams::new([ca_dns_name(cluster)]).map_err(TlsError::Issue)?;
        set_validity(&mut params, now, CA_VALIDITY)?;
        params.distinguished_name.push(DnType::CommonName, format!("Holdfast cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = new_key()?;
        let certificate = params.self_signed(&key).map_err(TlsError::Issue)?.into();
        Ok(Self { cluster, certificate, issuer: Issuer::new(params, key) })
    }

    /// Reads `ca.crt` and `ca.key` in `directory`.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let certificate = read_certificate(&directory.join(CA_CERTIFICATE))?;
        let path = directory.join(CA_KEY);
        let der = read_key(&path)?;
        let key = KeyPair::try_from(&PrivateKeyDer::from(der))
            .map_err(|e| TlsError::Pem { path: path.clone(), reason: e.to_string() })?;
        let cluster = ca_cluster(&certificate)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(TlsError::Issue)?;
        Ok(Self { cluster, certificate, issuer })
    }

    /// Writes `ca.crt` and `ca.key` into `directory`, which is created if it is missing.
    pub fn save(&self, directory: &Path) -> Result<(), TlsError> {
        create_directory(directory)?;
        write_secret(&directory.join(CA_KEY), &pem("PRIVATE KEY", self.issuer.key().serialized_der()))?;
        write_public(&directory.join(CA_CERTIFICATE), &pem("CERTIFICATE", &self.certificate))
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// A certificate (DER) for `node` and the key that signed `csr` (DER). Nothing else of the request counts.
    pub fn issue(&self, node: NodeName, csr: &[u8], now: Time, validity: Duration) -> Result<Vec<u8>, TlsError> {
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
            .map_err(TlsError::Request)?;
        let identity = PeerIdentity { cluster: self.cluster, node };
        let mut params = CertificateParams::new([identity.dns_name()]).map_err(TlsError::Issue)?;
        set_validity(&mut params, now, validity)?;
        params.distinguished_name.push(DnType::CommonName, node.to_string());
        params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(TlsError::Issue)?;
        Ok(certificate.der().to_vec())
    }

    /// A key and its certificate for `node`, made here: for the first nodes of a cluster, before anybody can enrol.
    pub fn issue_credentials(&self, node: NodeName, now: Time, validity: Duration) -> Result<Credentials, TlsError> {
        let key = NodeKey::generate()?;
        let certificate = self.issue(node, &key.csr()?, now, validity)?;
        Credentials::new(key, certificate, self.certificate.to_vec())
    }
}

fn set_validity(params: &mut CertificateParams, now: Time, validity: Duration) -> Result<(), TlsError> {
    let start = OffsetDateTime::from_unix_timestamp(now.secs).map_err(|_| TlsError::Issue(rcgen::Error::Time))?;
    params.not_before = start.saturating_sub(time::Duration::try_from(CLOCK_SKEW).unwrap_or_default());
    params.not_after = start.saturating_add(time::Duration::try_from(validity).unwrap_or(time::Duration::MAX));
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(())
}

fn ca_dns_name(cluster: ClusterId) -> String {
    format!("ca.{cluster}.holdfast")
}

fn ca_cluster(certificate: &CertificateDer<'_>) -> Result<ClusterId, TlsError> {
    let name = only_dns_name(certificate)?;
    name.strip_prefix("ca.")
        .and_then(|rest| rest.strip_suffix(".holdfast"))
        .and_then(parse_cluster)
        .ok_or_else(|| TlsError::Name(format!("{name:?} is not the name of a cluster's CA")))
}

fn only_dns_name(certificate: &CertificateDer<'_>) -> Result<String, TlsError> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|e| TlsError::Name(e.to_string()))?;
    let mut names = parsed.valid_dns_names();
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name.to_owned()),
        (None, _) => Err(TlsError::Name("it has no DNS name".into())),
        (Some(_), Some(_)) => Err(TlsError::Name("it has more than one DNS name".into())),
    }
}

/// Whom `certificate` (DER) names. Only as true as the check of its signature, which TLS makes.
pub fn certificate_identity(certificate: &CertificateDer<'_>) -> Result<PeerIdentity, TlsError> {
    let name = only_dns_name(certificate)?;
    PeerIdentity::from_dns_name(&name).ok_or_else(|| TlsError::Name(format!("{name:?} is not the name of a node")))
}

/// A private key that has no certificate yet.
pub struct NodeKey(KeyPair);

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeKey")
    }
}

/// Ed25519 (RFC 8032): a signature needs no randomness, and all are of one length.
fn new_key() -> Result<KeyPair, TlsError> {
    KeyPair::generate_for(&PKCS_ED25519).map_err(TlsError::Issue)
}

impl NodeKey {
    pub fn generate() -> Result<Self, TlsError> {
        new_key().map(Self)
    }

    /// Certificate signing request, DER. It proves possession of the key and asks for nothing.
    pub fn csr(&self) -> Result<Vec<u8>, TlsError> {
        let request = CertificateParams::default().serialize_request(&self.0).map_err(TlsError::Issue)?;
        Ok(request.der().to_vec())
    }
}

/// What a node proves itself with: key, certificate, and the CA that it trusts.
#[derive(Clone)]
pub struct Credentials {
    pub cluster: ClusterId,
    pub node: NodeName,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    key: Arc<PrivatePkcs8KeyDer<'static>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("cluster", &self.cluster).field("node", &self.node).finish_non_exhaustive()
    }
}

impl Credentials {
    /// From a key, its certificate and the CA (both DER). The identity is what the certificate says.
    pub fn new(key: NodeKey, certificate: Vec<u8>, ca: Vec<u8>) -> Result<Self, TlsError> {
        let key = PrivatePkcs8KeyDer::from(key.0.serialize_der());
        Self::from_der(key, certificate.into(), ca.into())
    }

    fn from_der(
        key: PrivatePkcs8KeyDer<'static>,
        certificate: CertificateDer<'static>,
        ca: CertificateDer<'static>,
    ) -> Result<Self, TlsError> {
        let PeerIdentity { cluster, node } = certificate_identity(&certificate)?;
        let expected = ca_cluster(&ca)?;
        if cluster != expected {
            return Err(TlsError::OtherCluster { node, found: cluster, expected });
        }
        Ok(Self { cluster, node, certificate, ca, key: Arc::new(key) })
    }

    /// Reads `node.crt`, `node.key` and `ca.crt` in `directory`. A key that others can read is refused.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let certificate = read_certificate(&directory.join(NODE_CERTIFICATE))?;
        let ca = read_certificate(&directory.join(CA_CERTIFICATE))?;
        Self::from_der(read_key(&directory.join(NODE_KEY))?, certificate, ca)
    }

    /// Writes `node.crt`, `node.key` and `ca.crt` into `directory`, which is created if it is missing. The certificate
    /// is written last: a directory that has one is complete.
    pub fn save(&self, directory: &Path) -> Result<(), TlsError> {
        create_directory(directory)?;
        write_secret(&directory.join(NODE_KEY), &pem("PRIVATE KEY", self.key.secret_pkcs8_der()))?;
        write_public(&directory.join(CA_CERTIFICATE), &pem("CERTIFICATE", &self.ca))?;
        write_public(&directory.join(NODE_CERTIFICATE), &pem("CERTIFICATE", &self.certificate))
    }

    pub fn identity(&self) -> PeerIdentity {
        PeerIdentity { cluster: self.cluster, node: self.node }
    }

    /// DER.
    pub fn ca(&self) -> &[u8] {
        &self.ca
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.ca)
    }

    /// Whether the cluster's CA signed this certificate and both are good at `now`: what every peer will check.
    pub fn check(&self, now: Time) -> Result<(), TlsError> {
        verify_chain(&self.certificate, &self.ca, now).map_err(|e| TlsError::Setup(e.to_string()))
    }

    /// A secret that survives restarts with the key and tells nothing about it.
    pub(super) fn derive_secret(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, self.key.secret_pkcs8_der())
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        roots_of(&self.ca)
    }

    /// The CA goes along, for those who enrol and know only its fingerprint.
    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone(), self.ca.clone()]
    }

    /// For calls to nodes of the cluster: both sides prove themselves.
    pub(super) fn client_config(&self) -> Result<rustls::ClientConfig, TlsError> {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider()).build().map_err(setup)?;
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let mut config = client_builder(verifier)?.with_client_auth_cert(self.chain(), key).map_err(setup)?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// For serving: a client's certificate, when there is one, must be good; that there is one, whoever
    /// accepts the connection checks, because enrolment does without.
    pub(super) fn server_config(&self, enrol: bool) -> Result<rustls::ServerConfig, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider());
        let verifier = if enrol { verifier.allow_unauthenticated() } else { verifier };
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(setup)?
            .with_client_cert_verifier(verifier.build().map_err(setup)?)
            .with_single_cert(self.chain(), PrivateKeyDer::Pkcs8(self.key.clone_key()))
            .map_err(setup)?;
        config.send_tls13_tickets = 0;
        config.alpn_protocols = if enrol { vec![ALPN.to_vec(), ALPN_ENROL.to_vec()] } else { vec![ALPN.to_vec()] };
        Ok(config)
    }
}

fn setup(error: impl std::fmt::Display) -> TlsError {
    TlsError::Setup(error.to_string())
}

fn roots_of(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(setup)?;
    Ok(Arc::new(roots))
}

/// Ring, with the cheapest cipher first. AES-128 must stay: QUIC's first packets are defined by it.
pub(super) fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

pub(super) fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    // "Dangerous" is rustls's word for any verifier that is given as an object; both of ours check everything.
    Ok(rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

/// That `ca` signed `certificate` for a server, and that it is valid at `now`.
fn verify_chain(certificate: &CertificateDer<'_>, ca: &CertificateDer<'_>, now: Time) -> Result<(), webpki::Error> {
    let now = UnixTime::since_unix_epoch(Duration::new(u64::try_from(now.secs).unwrap_or(0), 0));
    verify_chain_at(certificate, ca, now)
}

pub(super) fn verify_chain_at(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let anchor = webpki::anchor_from_trusted_cert(ca)?;
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let leaf = webpki::EndEntityCert::try_from(certificate)?;
    leaf.verify_for_usage(algorithms, &[anchor], &[], now, webpki::KeyUsage::server_auth(), None, None)?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, TlsError> {
    CertificateDer::from_pem_slice(&read(path)?)
        .map_err(|e| TlsError::Pem { path: path.to_owned(), reason: e.to_string() })
}

fn read_key(path: &Path) -> Result<PrivatePkcs8KeyDer<'static>, TlsError> {
    let metadata = fs::metadata(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TlsError::Exposed { path: path.to_owned(), mode });
    }
    PrivatePkcs8KeyDer::from_pem_slice(&read(path)?)
        .map_err(|e| TlsError::Pem { path: path.to_owned(), reason: e.to_string() })
}

fn create_directory(path: &Path) -> Result<(), TlsError> {
    fs::create_dir_all(path).map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

fn write_public(path: &Path, text: &str) -> Result<(), TlsError> {
    write_atomically(path, text, 0o644)
}

fn write_secret(path: &Path, text: &str) -> Result<(), TlsError> {
    write_atomically(path, text, 0o600)
}

fn write_atomically(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    replace_file(path, text.as_bytes(), mode).map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

/// The file is the old one or the new one at every moment, also after a power cut.
fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension(format!("{:08x}.tmp", rand::random::<u32>()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        if let Err(left) = fs::remove_file(&temporary) {
            tracing::debug!(path = %temporary.display(), error = %left, "a temporary file stays behind");
        }
        return Err(error);
    }
    fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    let body = base64(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0u32, |word, byte| (word << 8) | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = (word >> (18 - 6 * place)) & 63;
            text.push(if place <= group.len() { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    text
}
