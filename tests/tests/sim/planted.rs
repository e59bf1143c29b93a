//! The storm finds bugs: each of those that are planted is convicted within a few histories.
//!
//! What can go wrong with garbage alone is convicted by the exhaustive search beside its rules (server/src/meta/state/tests/garbage_model.rs).

use holdfast_common::planted::{Bug, plant};

use crate::storm::told_by_a_process;

/// Histories within which a bug has to show.
const SEEDS: u64 = 60;

/// Names the bug that a process has.
const BUG: &str = "HOLDFAST_PLANTED_BUG";

/// What the process that runs a history does first.
pub(crate) fn plant_chosen() {
    let chosen = std::env::var(BUG).expect("a bug, or none");
    let bug = Bug::ALL.into_iter().find(|bug| chosen == format!("{bug:?}"));
    assert!(bug.is_some() || chosen == NONE, "{chosen} is no bug");
    bug.into_iter().for_each(plant);
}

const NONE: &str = "none";

/// Some history is found wrong, and without the bug nothing is wrong with it.
fn convict(bug: Bug) {
    let environment = [(BUG, format!("{bug:?}"))];
    let found = (1..=SEEDS).find(|seed| told_by_a_process(*seed, &environment).is_err());
    let seed = found.unwrap_or_else(|| panic!("{bug:?} is not found in {SEEDS} histories"));
    let innocent = told_by_a_process(seed, &[(BUG, NONE.to_owned())]);
    assert!(innocent.is_ok(), "it was not {bug:?}: {innocent:?}");
}

macro_rules! each_is_found {
    ($($name:ident: $bug:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            convict(Bug::$bug);
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
    a_storage_server_that_does_not_notice_its_power_cut: BootKept,
    a_checkpoint_of_what_is_not_durable: CheckpointUncovered,
}
