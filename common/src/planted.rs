//! Bugs that are planted on purpose, one at a time, to show that the simulation can fail. Without the feature `planted` there are none,
//! and nothing of this is in a program.

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// A storage server says that it has synced, and has not.
    SyncSkipped = 1,
    /// The metadata server says that a change is durable before it is.
    DurableTooEarly,
    /// A change that is asked for again is made again.
    AnswerForgotten,
    /// A mount believes what servers send.
    ReadsUnverified,
    /// A mount does not say again what a metadata server has lost.
    ReplaySkipped,
    /// A metadata server that has lost its power goes on as if it had not.
    PowerCutUnnoticed,
    /// What is overwritten or deleted stays counted.
    ReferencesLeak,
    /// What is condemned is not deleted.
    GarbageKept,
    /// A storage server answers for some blocks that it has not taken: a commit names what is nowhere.
    PutForgotten,
    /// A metadata server that makes changes durable does not ask whether their blocks are.
    BarrierAsksNobody,
    /// What is owed a copy gets none.
    OwedForgotten,
    /// A storage server whose machine has lost its power believes that it has all that it had.
    BootKept,
    /// A checkpoint does not wait for the barrier that covers what it makes durable.
    CheckpointUncovered,
}

impl Bug {
    pub const ALL: [Self; 13] = [
        Self::SyncSkipped,
        Self::DurableTooEarly,
        Self::AnswerForgotten,
        Self::ReadsUnverified,
        Self::ReplaySkipped,
        Self::PowerCutUnnoticed,
        Self::ReferencesLeak,
        Self::GarbageKept,
        Self::PutForgotten,
        Self::BarrierAsksNobody,
        Self::OwedForgotten,
        Self::BootKept,
        Self::CheckpointUncovered,
    ];
}

#[cfg(feature = "planted")]
static CHOSEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// From now on this process does that wrong, and nothing else.
#[cfg(feature = "planted")]
pub fn plant(bug: Bug) {
    CHOSEN.store(bug as u8, std::sync::atomic::Ordering::SeqCst);
}

/// Is that to be done wrong?
#[cfg(feature = "planted")]
pub fn is_planted(bug: Bug) -> bool {
    CHOSEN.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// Is that to be done wrong? No.
#[cfg(not(feature = "planted"))]
pub const fn is_planted(_: Bug) -> bool {
    false
}
