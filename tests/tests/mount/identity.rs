//! Who may do what: certificates, roles, tokens.

use std::{fs, path::Path, process::Output, time::Duration};

use holdfast_common::{
    BootId, ClusterId, Refusal, SessionId, Time,
    net::{
        identity::{NodeName, Role},
        tls::{Ca, NODE_VALIDITY},
    },
    wire::{
        meta::{AdminRequest, MetaRequest, Query, StorageLoad, StorageNotice},
        storage::StorageRequest,
    },
};
use holdfast_tests::{
    ask::now,
    cluster::{Cluster, holdfast, holdfast_ok, temp_dir},
    process, shell, wait,
};

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn token(cluster: &Cluster, role: &str) -> String {
    let said = holdfast_ok(&["token", "--role", role, "--dir", text(cluster.path())]);
    said.split_whitespace().max_by_key(|word| word.len()).expect("a token is printed").to_owned()
}

#[test]
fn a_token_makes_one_certificate_and_no_second_one() {
    let (cluster, dir) = (Cluster::start(), temp_dir());
    let token = token(&cluster, "client");
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    holdfast_ok(&["enrol", &token, "--tls-dir", text(&first)]);
    let keys = holdfast_tests::fault::files(&first);
    assert!(keys.iter().any(|file| file.to_string_lossy().contains("key")), "{keys:?}");
    let again = holdfast(&["enrol", &token, "--tls-dir", text(&second)]);
    assert!(!again.status.success() && said(&again).contains("token"), "{}", said(&again));
    assert!(!second.exists() || holdfast_tests::fault::files(&second).is_empty(), "a refused enrolment leaves nothing");
}

#[test]
fn an_expired_or_invented_token_is_refused() {
    let (cluster, dir) = (Cluster::start(), temp_dir());
    let output = holdfast_ok(&["token", "--role", "client", "--valid", "1s", "--dir", text(cluster.path())]);
    let short = output.split_whitespace().max_by_key(|word| word.len()).expect("a token").to_owned();
    // Asking would use it up. It was issued before now, by a server that reads the same clock.
    let issued_before = now();
    let expired = Time { secs: issued_before.secs + 1, ..issued_before };
    wait::until("the token's second is over", Duration::from_secs(20), || now() >= expired);
    let late = holdfast(&["enrol", &short, "--tls-dir", text(&dir.path().join("late"))]);
    assert!(!late.status.success() && said(&late).contains("token"), "{}", said(&late));
    // In the middle: the last letter of an encoding may carry bits that mean nothing.
    let mut invented = token(&cluster, "client").into_bytes();
    let middle = invented.len() / 2;
    invented[middle] = if invented[middle] == b'a' { b'b' } else { b'a' };
    let invented = String::from_utf8(invented).expect("a token is ASCII");
    let output = holdfast(&["enrol", &invented, "--tls-dir", text(&dir.path().join("invented"))]);
    assert!(!output.status.success(), "{}", said(&output));
}

#[test]
fn an_enrolled_mount_works_with_its_own_certificate() {
    let (cluster, dir) = (Cluster::start(), temp_dir());
    let tls = dir.path().join("tls");
    holdfast_ok(&["enrol", &token(&cluster, "client"), "--tls-dir", text(&tls)]);
    cluster.set("client.toml", "tls_dir", text(&tls).to_owned());
    let mount = cluster.mount();
    fs::write(mount.join("file"), "by an enrolled mount").expect("write");
    mount.remount();
    assert_eq!(fs::read_to_string(mount.join("file")).expect("read"), "by an enrolled mount");
}

#[test]
fn a_client_certificate_cannot_run_a_storage_server() {
    let cluster = Cluster::start();
    cluster.storage(1).terminate(Duration::from_secs(20));
    cluster.set("storage-1/storage.toml", "tls_dir", text(&cluster.client_tls()).to_owned());
    let mut command = process::binary("holdfastd");
    command.arg("storage").arg("--config").arg(cluster.path().join("storage-1/storage.toml"));
    let output = shell::complete(command, Duration::from_secs(20));
    assert!(!output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("client"), "{}", said(&output));
}

#[test]
fn a_mount_of_another_cluster_is_refused_and_logged() {
    let (cluster, other) = (Cluster::start(), Cluster::start());
    other.set("client.toml", "meta", cluster.get("client.toml", "meta"));
    let target = other.path().join("mnt-1");
    fs::create_dir_all(&target).expect("make a mount point");
    let output = holdfast(&["mount", text(&other.path().join("client.toml")), text(&target), "-f"]);
    assert!(!output.status.success(), "{}", said(&output));
    let log = cluster.meta().log();
    assert!(log.to_lowercase().contains("certificate"), "the refusal is logged: {log}");
}

#[test]
fn a_new_cluster_is_made_from_nothing_but_init() {
    let dir = temp_dir();
    let made = dir.path().join("cluster");
    holdfast_ok(&["init", text(&made)]);
    let keys: Vec<_> =
        holdfast_tests::fault::files(&made).into_iter().filter(|file| file.to_string_lossy().contains("key")).collect();
    assert!(!keys.is_empty(), "a CA and an administrator have keys");
    for key in keys {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&key).expect("stat").permissions().mode() & 0o777, 0o600, "{}", key.display());
    }
    let again = holdfast(&["init", text(&made)]);
    assert!(!again.status.success(), "init must not overwrite a cluster: {}", said(&again));
}

#[test]
fn every_request_is_checked_against_the_role_in_the_certificate() {
    let cluster = Cluster::start();
    let heartbeat = MetaRequest::Storage(StorageNotice::Heartbeat {
        address: ([127, 0, 0, 1], 9).into(),
        zone: String::new(),
        boot: BootId(1),
        load: StorageLoad::default(),
    });
    let token = MetaRequest::Admin(AdminRequest::IssueToken { role: Role::Admin, valid_secs: 60 });
    let query = MetaRequest::Query { session: SessionId(0), query: Query::StatFs };
    for (role, request, allowed) in [
        (Role::Client, &heartbeat, false),
        (Role::Admin, &heartbeat, false),
        (Role::Client, &token, false),
        (Role::Storage, &token, false),
        (Role::Storage, &query, false),
        (Role::Client, &query, true),
        (Role::Admin, &query, true),
    ] {
        let reply = cluster.ask_meta(cluster.issue(role), request).expect("an answer");
        assert_eq!(reply.result != Err(Refusal::WrongRole), allowed, "{role} asks {request:?}: {:?}", reply.result);
    }
    for (role, request, allowed) in [
        (Role::Client, StorageRequest::Sync, false),
        (Role::Client, StorageRequest::List { after: None }, false),
        (Role::Client, StorageRequest::Delete { blocks: Vec::new(), epoch: holdfast_common::Epoch(1) }, false),
        (Role::Admin, StorageRequest::Sync, false),
        (Role::Meta, StorageRequest::Sync, true),
    ] {
        let reply = cluster.ask_storage(cluster.issue(role), &request).expect("an answer");
        assert_eq!(reply.0 != Err(Refusal::WrongRole), allowed, "{role} asks {request:?}: {:?}", reply.0);
    }
}

#[test]
fn expired_foreign_and_other_clusters_certificates_are_refused() {
    let cluster = Cluster::start();
    let query = MetaRequest::Query { session: SessionId(0), query: Query::StatFs };
    let long_ago = Time { secs: now().secs - 1_000_000, nanos: 0 };
    let expired = cluster.issue_at(Role::Client, long_ago, Duration::from_secs(3600));
    let of_another = |id| {
        let ca = Ca::create(id, now()).expect("a CA");
        ca.issue_credentials(NodeName { role: Role::Client, id: 1 }, now(), NODE_VALIDITY).expect("the CA signs")
    };
    // The same cluster's name, but signed by somebody else.
    let own = cluster.issue(Role::Client).cluster;
    for (what, credentials) in
        [("expired", expired), ("foreign", of_another(ClusterId([9; 16]))), ("forged", of_another(own))]
    {
        let answer = cluster.ask_meta(credentials.clone(), &query);
        assert!(answer.is_err(), "{what}: the metadata server answered {answer:?}");
        let answer = cluster.ask_storage(credentials, &StorageRequest::Has { blocks: Vec::new() });
        assert!(answer.is_err(), "{what}: the storage server answered {answer:?}");
    }
    let good = cluster.issue(Role::Client);
    assert!(cluster.ask_meta(good, &query).expect("a good certificate is answered").result.is_ok());
}
