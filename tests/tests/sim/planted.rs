//! The storm finds bugs: each of those that are planted is convicted within a few histories.
//!
//! What can go wrong with garbage alone is convicted by the exhaustive search beside its rules (server/src/meta/state/tests/garbage_model.rs).
//! A process has one bug, so that these need a process each, as nextest gives them.

use holdfast_common::planted::{Bug, plant};

use crate::{node::run, storm::history};

/// Histories within which a bug has to show.
const SEEDS: u64 = 30;

/// The first history in which it does, and how.
fn convict(bug: Bug) -> (u64, String) {
    plant(bug);
    let found = (1..=SEEDS).find_map(|seed| {
        // What is wrong may also be a promise that the code itself sees broken.
        let outcome = std::panic::catch_unwind(|| run(history(seed)));
        match outcome {
            Ok(Ok(())) => None,
            Ok(Err(wrong)) => Some((seed, wrong)),
            Err(_) => Some((seed, "a panic".to_owned())),
        }
    });
    found.unwrap_or_else(|| panic!("{bug:?} is not found in {SEEDS} histories"))
}

macro_rules! each_is_found {
    ($($name:ident: $bug:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            let (seed, wrong) = convict(Bug::$bug);
            assert!(seed <= SEEDS && !wrong.is_empty());
        }
    )*

    #[test]
    fn every_bug_that_can_be_planted_is_among_them() {
        assert_eq!([$(Bug::$bug),*], Bug::ALL);
    }};
}

each_is_found! {
    a_storage_server_that_does_not_sync: SyncSkipped,
    a_metadata_server_that_says_durable_too_early: DurableTooEarly,
    a_change_that_is_made_twice: AnswerForgotten,
    a_read_that_is_not_verified: ReadsUnverified,
    a_mount_that_does_not_say_again_what_was_lost: ReplaySkipped,
    a_power_cut_that_is_not_noticed: PowerCutUnnoticed,
    references_that_leak: ReferencesLeak,
    garbage_that_is_kept: GarbageKept,
    a_block_that_is_nowhere_when_it_is_committed: PutForgotten,
    a_barrier_that_asks_no_storage_server: BarrierAsksNobody,
    copies_that_are_owed_and_not_made: OwedForgotten,
}
