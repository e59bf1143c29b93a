//! Random operations on a mount, compared with the model after every step and again after a remount.

use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_tests::{
    cluster::Cluster,
    model::{DirectTree, InTurn, Memory, RealTree, check, ops},
};
use proptest::{
    prelude::*,
    test_runner::{FileFailurePersistence, TestRunner},
};

fn config(cases: u32) -> ProptestConfig {
    let source = Box::new(FileFailurePersistence::Direct(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/proptest-regressions/mount_model.txt"
    )));
    ProptestConfig { cases, max_shrink_iters: 300, failure_persistence: Some(source), ..ProptestConfig::default() }
}

#[test]
fn random_operations_on_a_mount_are_answered_as_the_model_says() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let rounds = AtomicUsize::new(0);
    let mut runner = TestRunner::new(config(120));
    let outcome = runner.run(&ops(50), |ops| {
        let root = mount.join(format!("round-{}", rounds.fetch_add(1, Ordering::Relaxed)));
        check(&mut Memory::default(), &mut RealTree::new(root), &ops)
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

/// "What is done under one lock, on whichever mounts, is as if there were one mount."
#[test]
fn random_operations_on_two_mounts_under_a_lock_are_answered_as_the_model_says() {
    let cluster = Cluster::start();
    let (a, b) = (cluster.mount(), cluster.mount());
    let rounds = AtomicUsize::new(0);
    let mut runner = TestRunner::new(config(100));
    let outcome = runner.run(&ops(50), |ops| {
        let name = format!("round-{}", rounds.fetch_add(1, Ordering::Relaxed));
        check(&mut Memory::default(), &mut InTurn::new([a.path(), b.path()], &name), &ops)
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn what_random_operations_left_is_the_same_after_a_remount() {
    let cluster = Cluster::start();
    let mount = cluster.mount();
    let rounds = AtomicUsize::new(0);
    let mut runner = TestRunner::new(config(12));
    let outcome = runner.run(&ops(120), |ops| {
        let root = mount.join(format!("round-{}", rounds.fetch_add(1, Ordering::Relaxed)));
        let (mut model, mut real) = (Memory::default(), RealTree::new(root));
        check(&mut model, &mut real, &ops)?;
        mount.remount();
        check(&mut model, &mut real, &[])
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn random_operations_without_a_kernel_are_answered_as_the_model_says() {
    let cluster = Cluster::start();
    let direct = DirectTree::connect(&cluster.get("client.toml", "meta"), &cluster.client_tls());
    let rounds = AtomicUsize::new(0);
    let mut runner = TestRunner::new(config(150));
    let outcome = runner.run(&ops(50), |ops| {
        let root = format!("round-{}", rounds.fetch_add(1, Ordering::Relaxed));
        check(&mut Memory::default(), &mut direct.below(&root), &ops)
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}
