//! Questions to a cluster's metadata server: its state, and tokens for newcomers.

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use clap::Args;
use holdfast_common::{
    Refusal,
    config::{ClientConfig, ClientOptions},
    net::{
        CallError, Endpoint, Frame, Peers,
        enrol::Token,
        identity::Role,
        quic::{BindError, NetOptions, Node},
        tls::{Credentials, Fingerprint},
    },
    wire::{
        codec::{self, CodecError},
        meta::{AdminRequest, ClusterStatus, MetaAnswer, MetaReply, MetaRequest},
    },
};

use super::{
    error::{CliError, CliResult},
    identity::ADMIN_CONFIG,
    local, mount, print, status as show,
};
use crate::mount::{any_port_towards, options::parse_time};

/// How long a server that an order goes to may be busy, or just have been restarted.
const ORDER_PATIENCE: Duration = Duration::from_secs(15);
const ORDER_PAUSE: Duration = Duration::from_millis(200);
/// One answer of the metadata server.
const DEADLINE: Duration = Duration::from_secs(4);
const COMPARE_DEADLINE: Duration = Duration::from_secs(60);
const LONG_DEADLINE: Duration = Duration::from_secs(3600);

/// Which cluster is meant.
#[derive(Clone, Debug, Args)]
pub(super) struct Target {
    /// Directory of the cluster, as `up` or `init` made it
    /// [default: /var/lib/holdfast/local as root, else ~/.local/share/holdfast/local]
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    pub dir: Option<PathBuf>,
    /// Client configuration of a cluster elsewhere
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl Target {
    pub(super) fn load(&self) -> CliResult<ClientConfig> {
        match &self.config {
            Some(file) => Ok(ClientConfig::load(Some(file), ClientOptions::default())?),
            None => of_directory(&local::directory(self.dir.as_deref())?),
        }
    }
}

/// How the administrator of the cluster in `dir` talks to it.
pub(super) fn of_directory(dir: &Path) -> CliResult<ClientConfig> {
    let file = dir.join(ADMIN_CONFIG);
    if !file.is_file() {
        let dir = dir.display();
        return Err(CliError::new(format!(
            "there is no cluster in {dir}: make one with `holdfast up` or `holdfast init`"
        )));
    }
    Ok(ClientConfig::load(Some(&file), ClientOptions::default())?)
}

/// Show the state of a cluster
///
/// Servers, mounts, how many copies of each block there are, and the damage that was met and repaired.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub target: Target,
    /// As one JSON object, for programs
    #[arg(long)]
    pub json: bool,
}

/// Issue a one-time token that lets a server or a mount join
///
/// Whoever has it can join, once, until it expires: carry it as you would a password.
#[derive(Debug, Args)]
pub(super) struct TokenArgs {
    /// What the newcomer will be
    #[arg(long, value_name = "ROLE", value_parser = newcomer)]
    pub role: Role,
    /// How long the token is good: 30m, 1h, 90s
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    pub valid: Duration,
    #[command(flatten)]
    pub target: Target,
}

fn newcomer(text: &str) -> Result<Role, String> {
    match text.parse() {
        Ok(role @ (Role::Storage | Role::Client)) => Ok(role),
        _ => Err(format!("{text:?} cannot join: storage or client can")),
    }
}

pub(super) fn status(args: &StatusArgs) -> CliResult {
    let status = ask_status(&args.target.load()?)?;
    match args.json {
        true => print(&format!("{:#}\n", show::json(&status)?)),
        false => print(&show::table(&status, SystemTime::now())),
    }
}

pub(super) fn token(args: &TokenArgs) -> CliResult {
    let token = ask_token(&args.target.load()?, args.role, args.valid)?;
    print(&format!("{token}\n"))
}

pub(super) fn ask_status(config: &ClientConfig) -> CliResult<ClusterStatus> {
    match ask(config, AdminRequest::Status)? {
        MetaAnswer::Status(status) => Ok(*status),
        _ => Err(AskError::Unexpected.into()),
    }
}

/// An order that is answered with nothing but that it was taken, and may be given again where it cannot be taken now.
pub(super) fn order(config: &ClientConfig, request: &AdminRequest) -> CliResult {
    let give_up = Instant::now() + ORDER_PATIENCE;
    let given = with_node(config, async |node, to| {
        loop {
            match call(&node, to, request.clone()).await {
                Ok(MetaAnswer::Done) => return Ok(()),
                Ok(_) => return Err(AskError::Unexpected),
                Err(AskError::Refused(Refusal::Unavailable)) if Instant::now() < give_up => {
                    tokio::time::sleep(ORDER_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    });
    Ok(given??)
}

pub(super) fn ask_token(config: &ClientConfig, role: Role, valid: Duration) -> CliResult<Token> {
    let credentials = Credentials::load(&config.tls_dir)?;
    match ask(config, AdminRequest::IssueToken { role, valid_secs: valid.as_secs().max(1) })? {
        MetaAnswer::Token { secret, ca_fingerprint } if Fingerprint(ca_fingerprint) == credentials.fingerprint() => {
            Ok(Token {
                cluster: credentials.cluster,
                fingerprint: Fingerprint(ca_fingerprint),
                secret,
                address: config.meta,
            })
        }
        _ => Err(AskError::Unexpected.into()),
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("the metadata server does not answer: {0}")]
    Call(#[from] CallError),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("the metadata server refuses: {0}")]
    Refused(Refusal),
    #[error("the metadata server gave an answer to another question")]
    Unexpected,
    #[error("the backup does not match its hash")]
    DamagedBackup,
    #[error(transparent)]
    Write(#[from] io::Error),
}

pub(super) fn ask(config: &ClientConfig, request: AdminRequest) -> CliResult<MetaAnswer> {
    Ok(with_node(config, |node, to| async move { call(&node, to, request).await })??)
}

/// Runs a conversation with the metadata server over one connection.
pub(super) fn with_node<T, F>(
    config: &ClientConfig,
    conversation: impl FnOnce(Arc<Node>, Endpoint) -> F,
) -> CliResult<Result<T, AskError>>
where
    F: Future<Output = Result<T, AskError>>,
{
    let credentials = Credentials::load(&config.tls_dir)?;
    let to = mount::meta_endpoint(config);
    Ok(wait(async {
        let options = NetOptions { connect_timeout: DEADLINE, ..NetOptions::default() };
        let node = Node::bind(any_port_towards(to.address), credentials, options)?;
        let result = conversation(Arc::clone(&node), to).await;
        farewell(&node).await;
        result
    })?)
}

pub(super) async fn call(node: &Arc<Node>, to: Endpoint, request: AdminRequest) -> Result<MetaAnswer, AskError> {
    // What looks at everything takes as long as there is much.
    let deadline = match request {
        AdminRequest::Check | AdminRequest::Mend | AdminRequest::Names { .. } | AdminRequest::Lost { .. } => {
            LONG_DEADLINE
        }
        AdminRequest::Compare { .. } => COMPARE_DEADLINE,
        _ => DEADLINE,
    };
    let header = codec::encode(&MetaRequest::Admin(request))?;
    let answer = node.call(to, Frame { header, payload: Vec::new() }, deadline).await?;
    let reply: MetaReply = codec::decode(&answer.header)?;
    reply.result.map_err(AskError::Refused)
}

/// Without it, the server would keep the connection until it times out.
async fn farewell(node: &Arc<Node>) {
    node.close();
    // A server that is gone needs no farewell.
    drop(tokio::time::timeout(Duration::from_millis(100), node.closed()).await);
}

/// Runs one conversation on a runtime of its own.
pub(super) fn wait<F: Future>(work: F) -> io::Result<F::Output> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_a_cluster_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = of_directory(dir.path()).unwrap_err().to_string();
        assert!(error.contains("there is no cluster in") && error.contains("holdfast up"), "{error}");
    }

    #[test]
    fn only_servers_and_mounts_can_join() {
        assert_eq!(newcomer("storage"), Ok(Role::Storage));
        assert_eq!(newcomer("client"), Ok(Role::Client));
        assert!(newcomer("admin").is_err() && newcomer("meta").is_err() && newcomer("x").is_err());
    }

    #[test]
    fn a_server_that_is_not_there_is_one_sentence_in_time() {
        let dir = tempfile::tempdir().unwrap();
        // Bound, and silent: nothing that answers can have this port.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        crate::cli::identity::create(dir.path(), address, address).unwrap();
        let started = std::time::Instant::now();
        let error = ask_status(&of_directory(dir.path()).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("the metadata server does not answer"), "{error}");
        assert!(!error.contains('\n'));
        assert!(started.elapsed() < Duration::from_secs(7));
    }
}
