//! Random operations on a mount, compared with the model after every step and again after a remount.

use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_tests::{
    cluster::Cluster,
    model::{DirectTree, InTurn, Memory, Op, RealTree, System, check, check_answers, data_ops, ops},
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

/// "What one mount has closed, another that opens afterwards reads, whatever both do to its data in turn."
#[test]
fn random_operations_on_the_data_of_two_mounts_without_a_lock_are_answered_as_the_model_says() {
    let cluster = Cluster::start();
    let (a, b) = (cluster.mount(), cluster.mount());
    let rounds = AtomicUsize::new(0);
    let mut runner = TestRunner::new(config(60));
    let outcome = runner.run(&data_ops(50), |ops| {
        let name = format!("round-{}", rounds.fetch_add(1, Ordering::Relaxed));
        let files = ["a", "b", "c"].map(|file| Op::Create { path: file.into(), mode: 0o644 });
        let mut model = Memory::default();
        let mut first = RealTree::new(a.join(&name));
        for create in &files {
            prop_assert_eq!(model.apply(create), first.apply(create));
        }
        let mut turns = InTurn::without_lock([a.path(), b.path()], &name);
        let reads = ["a", "b", "c"].map(|file| Op::Read { path: file.into(), offset: 0, length: 8 << 20 });
        check_answers(&mut model, &mut turns, &ops)?;
        check_answers(&mut model, &mut turns, &[&reads[..], &reads[..]].concat())
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
        real.drop_held();
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
