//! The servers as the client sees them: calls that retry, choose, hedge and verify.

pub mod batch;
pub mod behind;
pub mod blocks;
pub mod health;
pub mod locks;
pub mod meta;
pub mod near;
pub mod put;
pub mod retry;
pub mod undurable;

use std::{
    sync::{Arc, LazyLock},
    task::{Poll, Wake, Waker},
};

/// With which an operation is polled only to see whether memory can answer it. Wakes nobody: who polls with it polls again
/// with another one, whatever happens.
pub(crate) fn probe() -> &'static Waker {
    struct Nobody;
    impl Wake for Nobody {
        fn wake(self: Arc<Self>) {}
    }
    // One for all: no other is taken for it (`Waker::noop` may be several).
    static PROBE: LazyLock<Waker> = LazyLock::new(|| Waker::from(Arc::new(Nobody)));
    &PROBE
}

/// Ready at once, except when polled with [`probe`], on the thread of a kernel's request: that one is for the next request.
/// A call that is begun there wakes the network's thread twice, and holds the connection's lock that this one then wants.
pub(crate) async fn on_network_thread() {
    std::future::poll_fn(|context| match context.waker().will_wake(probe()) {
        true => Poll::Pending,
        false => Poll::Ready(()),
    })
    .await;
}
