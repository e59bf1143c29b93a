//! Servers on a simulated disk that loses, tears and fails.

mod store;
