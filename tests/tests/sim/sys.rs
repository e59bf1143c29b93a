//! Chance and time of a simulation: what the system would be asked for, on threads that simulate.
//!
//! std, tokio and rand take the seeds of their hash maps and generators from `getrandom`, and the time from `clock_gettime`; what makes
//! keys asks the kernel by `syscall`. A program may define them itself, which is what this one does: on every other thread they are the
//! system's.
#![allow(unsafe_code, reason = "three functions of the C library are defined here")]

use std::{
    cell::Cell,
    sync::atomic::{AtomicPtr, Ordering},
    time::{Duration, Instant},
};

use libc::{c_int, c_long, c_uint, c_void, clockid_t, size_t, ssize_t, timespec};

/// What simulated clocks show at the beginning: for some, a day in 2026.
const MONOTONIC_START: Duration = Duration::from_secs(1_000_000);
const REALTIME_START: Duration = Duration::from_secs(1_780_000_000);

thread_local! {
    static CHANCE: Cell<Option<u64>> = const { Cell::new(None) };
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
    /// Since the beginning, when it was last known.
    static PASSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static IS_LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// From now on this thread's chance follows from `seed`, and its time is that of the tokio runtime that it will run.
pub(crate) fn simulate(seed: u64) {
    CHANCE.set(Some(seed));
    BEGUN.set(Some(Instant::now()));
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn next(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, mixed ^ (mixed >> 31))
}

/// Since the simulation began.
fn passed(begun: Instant) -> Duration {
    // tokio asks the system when it has no runtime here: that answer is then taken from what was last known.
    if !IS_LOOKING.replace(true) {
        PASSED.set(tokio::time::Instant::now().into_std().saturating_duration_since(begun));
        IS_LOOKING.set(false);
    }
    PASSED.get()
}

/// As getrandom(2).
///
/// # Safety
/// `buffer` is valid for writes of `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    let Some(mut state) = CHANCE.get() else {
        // SAFETY: the caller's promise is what the system asks for.
        let got = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return ssize_t::try_from(got).unwrap_or(-1);
    };
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller promises that all of these bytes may be written.
    let bytes = unsafe {
        buffer.cast::<u8>().write_bytes(0, length);
        std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length)
    };
    for part in bytes.chunks_mut(8) {
        let drawn;
        (state, drawn) = next(state);
        part.copy_from_slice(&drawn.to_le_bytes()[..part.len()]);
    }
    CHANCE.set(Some(state));
    length.cast_signed()
}

type Syscall = unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;

/// The C library's own `syscall`. Whatever waits for another thread would ask for it itself.
static SYSTEM: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// As syscall(2).
///
/// # Safety
/// As the call that `number` stands for.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    one: c_long,
    two: c_long,
    three: c_long,
    four: c_long,
    five: c_long,
    six: c_long,
) -> c_long {
    if number == libc::SYS_getrandom && CHANCE.get().is_some() {
        let buffer =
            usize::try_from(one.cast_unsigned()).map_or(std::ptr::null_mut(), std::ptr::with_exposed_provenance_mut);
        let length = size_t::try_from(two.cast_unsigned()).unwrap_or(0);
        // SAFETY: the caller's promise is the same.
        let got = unsafe { getrandom(buffer, length, c_uint::try_from(three).unwrap_or(0)) };
        return c_long::try_from(got).unwrap_or(-1);
    }
    let mut system = SYSTEM.load(Ordering::Relaxed);
    if system.is_null() {
        // SAFETY: a name that ends with a zero.
        system = unsafe { libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr()) };
        assert!(!system.is_null(), "the C library has this function");
        SYSTEM.store(system, Ordering::Relaxed);
    }
    // SAFETY: it takes up to six arguments after the number, in the places of these, and looks at no more than the call has.
    let system = unsafe { std::mem::transmute::<*mut c_void, Syscall>(system) };
    // SAFETY: the caller's promise.
    unsafe { system(number, one, two, three, four, five, six) }
}

/// As clock_gettime(2).
///
/// # Safety
/// `time` is valid for writes.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let start = match (CHANCE.get(), clock) {
        (Some(_), libc::CLOCK_REALTIME) => REALTIME_START,
        (Some(_), libc::CLOCK_MONOTONIC) => MONOTONIC_START,
        _ => {
            // SAFETY: the caller's promise is what the system asks for.
            let done = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
            return c_int::try_from(done).unwrap_or(-1);
        }
    };
    let now = start + BEGUN.get().map_or(Duration::ZERO, passed);
    let seconds = libc::time_t::try_from(now.as_secs()).unwrap_or(libc::time_t::MAX);
    // SAFETY: the caller promises that this may be written.
    unsafe { time.write(timespec { tv_sec: seconds, tv_nsec: c_long::from(now.subsec_nanos().cast_signed()) }) };
    0
}
