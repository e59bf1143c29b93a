//! Who belongs to a cluster: its certificate authority, its first credentials, and enrolment.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::Args;
use holdfast_common::{
    ClusterId,
    clock::{Clock, SystemClock},
    config::META_PORT,
    net::{
        enrol::{self, Token},
        identity::{NodeName, Role},
        quic::NetOptions,
        tls::{Ca, Credentials, NODE_VALIDITY},
    },
};

use super::{
    admin,
    error::{CliError, CliResult},
    print,
};

/// Metadata server and administrator are the first of their role.
pub(super) const META_ID: u32 = 1;
const ADMIN_ID: u32 = 1;

pub(super) const CA_DIR: &str = "ca";
pub(super) const ADMIN_DIR: &str = "admin";
pub(super) const ADMIN_CONFIG: &str = "admin.toml";
pub(super) const META_CONFIG: &str = "meta/meta.toml";
const META_TLS: &str = "meta/tls";
const NODE_CERTIFICATE: &str = "node.crt";

/// Make a new cluster's identity
///
/// Makes the cluster's id, its certificate authority, the credentials of the metadata server and of the
/// administrator, and a configuration for the metadata server. Then start
/// `holdfastd meta --config DIR/meta/meta.toml`, and let others join with `holdfast token` and `holdfast enrol`.
#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Directory to make, readable by its owner only; keep it safe: who has it owns the cluster
    pub dir: PathBuf,
    /// Address at which others reach the metadata server
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, META_PORT)))]
    pub address: SocketAddr,
}

/// Become a member of a cluster
///
/// Makes a key, has the metadata server certify it, and keeps both. The token is used up.
#[derive(Debug, Args)]
pub(super) struct EnrolArgs {
    /// What `holdfast token` printed
    pub token: String,
    /// Directory for node.crt, node.key and ca.crt
    #[arg(long, value_name = "DIR")]
    pub tls_dir: PathBuf,
}

pub(super) fn init(args: &InitArgs) -> CliResult {
    let listen = SocketAddr::new(listen_everywhere(args.address.ip()), args.address.port());
    let cluster = create(&args.dir, args.address, listen)?;
    let dir = args.dir.display();
    print(&format!(
        "Cluster {cluster} is made in {dir}.\n\
         Start its metadata server:  holdfastd meta --config {dir}/{META_CONFIG}\n\
         Let a server or a mount in: holdfast token --dir {dir} --role storage   (or client)\n"
    ))
}

/// Loopback stays loopback; any other address is one of several that this machine may have.
fn listen_everywhere(address: IpAddr) -> IpAddr {
    match address {
        _ if address.is_loopback() => address,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Makes all that `init` promises in `dir`. The administrator's configuration comes last: who has it has all.
pub(super) fn create(dir: &Path, address: SocketAddr, listen: SocketAddr) -> CliResult<ClusterId> {
    if dir.join(ADMIN_CONFIG).exists() || dir.join(CA_DIR).join("ca.key").exists() {
        return Err(CliError::new(format!("{} holds a cluster already; nothing was changed", dir.display())));
    }
    private_directory(dir)?;
    let now = SystemClock::default().now();
    let ca = Ca::create(ClusterId(rand::random()), now)?;
    ca.save(&dir.join(CA_DIR))?;
    let issue = |role, id| ca.issue_credentials(NodeName { role, id }, now, NODE_VALIDITY);
    issue(Role::Meta, META_ID)?.save(&dir.join(META_TLS))?;
    issue(Role::Admin, ADMIN_ID)?.save(&dir.join(ADMIN_DIR))?;
    write(&dir.join(META_CONFIG), &meta_config(listen))?;
    write(&dir.join(ADMIN_CONFIG), &client_config(address, ADMIN_DIR))?;
    Ok(ca.cluster())
}

fn meta_config(listen: SocketAddr) -> String {
    format!(
        "# The metadata server: holdfastd meta --config THIS_FILE. Paths are relative to this file.\n\
         data_dir = \"data\"\n\
         tls_dir = \"tls\"\n\
         # With it, this server lets nodes enrol that have a token.\n\
         ca_dir = \"../{CA_DIR}\"\n\
         listen = \"{listen}\"\n"
    )
}

/// The configuration of a mount or of the administrator: where the metadata server is, and how to prove oneself.
pub(super) fn client_config(meta: SocketAddr, tls_dir: &str) -> String {
    format!("meta = \"{meta}\"\n# Relative to this file.\ntls_dir = \"{tls_dir}\"\n")
}

pub(super) fn private_directory(path: &Path) -> CliResult {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| CliError::from(error).during(format!("{} cannot be made", path.display())))
}

/// Whole or not at all.
pub(super) fn write(path: &Path, text: &str) -> CliResult {
    let partial = path.with_extension("new");
    let written = fs::write(&partial, text).and_then(|()| fs::rename(&partial, path));
    written.map_err(|error| CliError::from(error).during(format!("{} cannot be written", path.display())))
}

pub(super) fn enrol(args: &EnrolArgs) -> CliResult {
    let token: Token = args.token.parse()?;
    if args.tls_dir.join(NODE_CERTIFICATE).exists() {
        let dir = args.tls_dir.display();
        return Err(CliError::new(format!("{dir} has a certificate already; the token was not used")));
    }
    let credentials = join(&token, &args.tls_dir)?;
    print(&format!(
        "This is now {} of cluster {}. Its credentials are in {}.\n",
        credentials.node,
        credentials.cluster,
        args.tls_dir.display()
    ))
}

/// Uses `token` up, and keeps what it gave in `tls_dir`.
pub(super) fn join(token: &Token, tls_dir: &Path) -> CliResult<Credentials> {
    let credentials = admin::wait(async { enrol::enrol(token, &NetOptions::default()).await })??;
    credentials.save(tls_dir)?;
    Ok(credentials)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use holdfast_common::config::{ClientConfig, ClientOptions, MetaConfig, MetaOptions};

    use super::*;

    #[test]
    fn a_new_cluster_has_all_that_its_configurations_name() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("cluster");
        let address: SocketAddr = "10.1.2.3:7400".parse().unwrap();
        let cluster = create(&dir, address, "0.0.0.0:7400".parse().unwrap()).unwrap();

        let meta = MetaConfig::load(Some(&dir.join(META_CONFIG)), MetaOptions::default()).unwrap();
        assert_eq!(meta.listen.to_string(), "0.0.0.0:7400");
        let identity = Credentials::load(&meta.tls_dir).unwrap();
        assert_eq!((identity.cluster, identity.node), (cluster, NodeName { role: Role::Meta, id: META_ID }));
        assert_eq!(Ca::load(&meta.ca_dir.unwrap()).unwrap().cluster(), cluster);

        let admin = ClientConfig::load(Some(&dir.join(ADMIN_CONFIG)), ClientOptions::default()).unwrap();
        assert_eq!(admin.meta, address);
        assert_eq!(Credentials::load(&admin.tls_dir).unwrap().node.role, Role::Admin);

        for secret in ["", "ca/ca.key", "meta/tls/node.key", "admin/node.key"] {
            let mode = fs::metadata(dir.join(secret)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{secret} has mode {mode:o}");
        }
    }

    #[test]
    fn a_cluster_is_never_made_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let address = ([127, 0, 0, 1], 1).into();
        create(dir.path(), address, address).unwrap();
        let before = fs::read(dir.path().join("ca/ca.key")).unwrap();
        let error = create(dir.path(), address, address).unwrap_err().to_string();
        assert!(error.contains("holds a cluster already"), "{error}");
        assert_eq!(fs::read(dir.path().join("ca/ca.key")).unwrap(), before);
    }

    #[test]
    fn only_loopback_is_listened_on_alone() {
        for (address, listen) in
            [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("10.0.0.1", "0.0.0.0"), ("fd00::1", "::")]
        {
            assert_eq!(listen_everywhere(address.parse().unwrap()).to_string(), listen);
        }
    }
}
