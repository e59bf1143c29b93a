//! Reads that no thread waits for: io_uring, one ring for each thread that runs a runtime alone.
//!
//! As far as that goes: whoever submits a read may have to wait for a lock of the filesystem, for where a file's bytes are on the disk, or
//! for a place in the disk's queue. So when a read has been under way for long, threads read instead.
//!
//! What memory has is there when the read has been submitted. Anything else goes to the disk, and its end wakes the runtime as a
//! datagram does; a thread that only waits would have to be woken twice, which costs more than a small read from a fast disk.
//! See io_uring(7), and io_uring_setup(2) for `IORING_SETUP_DEFER_TASKRUN`: what a read has left to do is done when the runtime asks.
//!
//! Where there is no io_uring (kernels before 6.1, containers that forbid it, simulations) there is no ring: a thread has to wait.
#![allow(unsafe_code, reason = "the kernel writes into buffers while nobody borrows them")]

use std::{
    cell::RefCell,
    fs::File,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use io_uring::{IoUring, opcode, types::Fd};
use parking_lot::Mutex;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::{Handle, RuntimeFlavor},
    sync::oneshot,
    task::AbortHandle,
};

use super::Extent;
use crate::work;

/// Extents under way in one ring: more than a disk reads at once, and fewer than it lets wait before who submits has to.
const DEPTH: u32 = 64;
/// A disk that keeps a read for longer may keep whoever asks it for the next.
const LATE: Duration = Duration::from_millis(250);
/// After a ring could not be made or used; then another one is tried.
const PAUSE: Duration = Duration::from_secs(60);
/// Of the kernel's turns, in which it does some twenty of at most `DEPTH` each. Not for as long as its flag says that
/// there is more: that may be out of date.
const TURNS: usize = 8;
/// Extents of one read.
const EXTENTS_MAX: usize = 4;

/// Resolves to the bytes of each extent; to an error also if any of them is past the end of the file. Dropping it does no harm.
pub type Reading = oneshot::Receiver<io::Result<Vec<Bytes>>>;

thread_local! {
    static RING: RefCell<ThreadsRing> = const { RefCell::new(ThreadsRing::Untried) };
}

/// Starts to read `extents` of `file`. `None` if there is no ring, or enough under way.
pub(super) fn read(file: &File, extents: &[Extent]) -> Option<Reading> {
    RING.with_borrow_mut(|ring| ring.get()?.lock().start(file, extents))
}

enum ThreadsRing {
    Untried,
    /// It failed then.
    Impossible(Instant),
    Started(Arc<Mutex<Ring>>),
}

impl ThreadsRing {
    /// A ring in order, made now if this thread has none; one whose runtime has ended is of no use any more.
    fn get(&mut self) -> Option<&Mutex<Ring>> {
        let closed = match self {
            Self::Untried => Some(Closed::Ended),
            Self::Impossible(since) => (since.elapsed() > PAUSE).then_some(Closed::Ended),
            Self::Started(ring) => ring.lock().closed,
        };
        match closed {
            None => {}
            Some(Closed::Broken) => *self = Self::Impossible(Instant::now()),
            Some(Closed::Ended) => *self = self.renewed(),
        }
        if let Self::Started(ring) = self { Some(ring) } else { None }
    }

    fn renewed(&self) -> Self {
        Ring::new().map_or_else(
            |error| {
                match self {
                    Self::Impossible(_) => tracing::debug!(%error, "still no io_uring"),
                    Self::Untried | Self::Started(_) => tracing::info!(%error, "no io_uring: threads wait for reads"),
                }
                Self::Impossible(Instant::now())
            },
            Self::Started,
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closed {
    /// With its runtime.
    Ended,
    /// The kernel did not take what it was given.
    Broken,
}

struct Ring {
    uring: IoUring,
    /// By slot.
    batches: Vec<Option<Batch>>,
    /// Extents that the kernel has.
    under_way: u32,
    /// Passes on what is done; none before it is there.
    reaper: Option<AbortHandle>,
    /// Nothing is read with it any more.
    closed: Option<Closed>,
}

/// The extents of one read. The kernel writes into `buffers` until all are done.
struct Batch {
    started: Instant,
    buffers: Vec<Vec<u8>>,
    lengths: Vec<u32>,
    unfinished: u32,
    error: Option<io::Error>,
    reader: oneshot::Sender<io::Result<Vec<Bytes>>>,
}

impl Ring {
    /// For the runtime that runs the calling thread, which must have its I/O enabled (else this panics).
    fn new() -> io::Result<Arc<Mutex<Self>>> {
        let runtime = Handle::try_current().map_err(io::Error::other)?;
        if work::is_simulated() || runtime.runtime_flavor() != RuntimeFlavor::CurrentThread {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(DEPTH)?;
        let event = new_event()?;
        uring.submitter().register_eventfd(event.as_raw_fd())?;
        // SAFETY: an `OwnedFd` always gives the same descriptor, and keeps it open for as long as it is owned.
        let event = unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }.map_err(io::Error::other)?;
        let ring = Arc::new(Mutex::new(Self { uring, batches: Vec::new(), under_way: 0, reaper: None, closed: None }));
        let reaper = runtime.spawn(reap(event, Closing(Arc::clone(&ring))));
        ring.lock().reaper = Some(reaper.abort_handle());
        Ok(ring)
    }

    fn start(&mut self, file: &File, extents: &[Extent]) -> Option<Reading> {
        let count = u32::try_from(extents.len()).ok()?;
        if self.closed.is_some()
            || extents.is_empty()
            || extents.len() > EXTENTS_MAX
            || self.under_way + count > DEPTH
            || self.is_late()
        {
            return None;
        }
        let lengths: Vec<u32> =
            extents.iter().map(|extent| u32::try_from(extent.length).ok()).collect::<Option<_>>()?;
        let (reader, reading) = oneshot::channel();
        let mut buffers: Vec<Vec<u8>> = extents.iter().map(|extent| Vec::with_capacity(extent.length)).collect();
        let slot = self.free_slot();
        for (number, (extent, length)) in extents.iter().zip(&lengths).enumerate() {
            let entry = opcode::Read::new(Fd(file.as_raw_fd()), buffers[number].as_mut_ptr(), *length)
                .offset(extent.offset)
                .build()
                .user_data(tag(slot, number));
            // SAFETY: the buffer has room for `length` bytes, and stays where it is (see `Batch` and `drop`) until the kernel
            // says that it is done with it. The descriptor is open until the entry has been submitted, below; from then
            // on the kernel holds the file itself.
            unsafe { self.uring.submission().push(&entry) }
                .expect("there is room: never more than DEPTH are under way");
        }
        self.batches[slot] =
            Some(Batch { started: Instant::now(), buffers, lengths, unfinished: count, error: None, reader });
        self.under_way += count;
        self.enter(count);
        Some(reading)
    }

    fn is_late(&self) -> bool {
        self.under_way > 0 && self.batches.iter().flatten().any(|batch| batch.started.elapsed() > LATE)
    }

    fn free_slot(&mut self) -> usize {
        self.batches.iter().position(Option::is_none).unwrap_or_else(|| {
            self.batches.push(None);
            self.batches.len() - 1
        })
    }

    /// Submits the last `submitted` entries, has the kernel do what reads have left to do, and passes on what is done.
    fn enter(&mut self, submitted: u32) {
        const IORING_ENTER_GETEVENTS: u32 = 1;
        let entered = loop {
            // SAFETY: no signal mask is passed, and what the entries point to outlives them, see `start`.
            let entered =
                unsafe { self.uring.submitter().enter::<libc::sigset_t>(submitted, 0, IORING_ENTER_GETEVENTS, None) };
            match entered {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let done: Vec<(u64, i32)> = self.uring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        done.into_iter().for_each(|(tag, result)| self.finish(tag, result));
        match entered {
            Ok(count) if count == submitted as usize => {}
            // What the kernel did not take it would take with the next: nobody may read with this ring again.
            other => {
                tracing::warn!(?other, submitted, "io_uring_enter");
                self.close(Closed::Broken);
            }
        }
    }

    fn finish(&mut self, tag: u64, result: i32) {
        let (slot, number) = from_tag(tag);
        let Some(place) = self.batches.get_mut(slot) else { return };
        let Some(batch) = place.as_mut() else { return };
        self.under_way -= 1;
        batch.unfinished -= 1;
        let buffer = &mut batch.buffers[number];
        match u32::try_from(result) {
            // SAFETY: the kernel has written so many bytes, for which there was room.
            Ok(length) if length == batch.lengths[number] => unsafe { buffer.set_len(length as usize) },
            Ok(_) => batch.error = Some(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => batch.error = Some(io::Error::from_raw_os_error(-result)),
        }
        if batch.unfinished == 0
            && let Some(Batch { buffers, error, reader, .. }) = place.take()
        {
            // Nobody may be waiting any more.
            drop(reader.send(error.map_or_else(|| Ok(buffers.into_iter().map(Bytes::from).collect()), Err)));
        }
    }

    /// Whoever waits learns that nothing will come. The kernel may write into the buffers for as long as the process lives.
    fn close(&mut self, why: Closed) {
        self.closed.get_or_insert(why);
        self.reaper.take().into_iter().for_each(|reaper| reaper.abort());
        for batch in mem::take(&mut self.batches).into_iter().flatten() {
            tracing::debug!(?why, "a read is left to a thread");
            mem::forget(batch.buffers);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.close(Closed::Ended);
    }
}

/// Closes the ring when nobody looks for what is done any more.
struct Closing(Arc<Mutex<Ring>>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.lock().close(Closed::Ended);
    }
}

async fn reap(event: AsyncFd<OwnedFd>, ring: Closing) {
    while let Ok(mut ready) = event.readable().await {
        // Each event is a new edge: its count need not be read.
        ready.clear_ready();
        let mut ring = ring.0.lock();
        for _ in 0..TURNS {
            if ring.closed.is_some() || !ring.uring.submission().taskrun() {
                break;
            }
            ring.enter(0);
        }
    }
}

fn new_event() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn tag(slot: usize, number: usize) -> u64 {
    (slot * EXTENTS_MAX + number) as u64
}

fn from_tag(tag: u64) -> (usize, usize) {
    let tag = usize::try_from(tag).unwrap_or(usize::MAX);
    (tag / EXTENTS_MAX, tag % EXTENTS_MAX)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, thread::yield_now};

    use super::*;

    fn runs_alone(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    }

    /// A file from which nothing can be read until something is written to the other end, or `None` where there is no ring.
    fn silent() -> Option<(File, io::PipeWriter)> {
        let (end, other_end) = io::pipe().unwrap();
        Ring::new().is_ok().then(|| (File::from(OwnedFd::from(end)), other_end))
    }

    const BYTE: [Extent; 1] = [Extent { offset: 0, length: 1 }];

    #[test]
    fn more_than_its_depth_is_not_taken_until_something_is_done() {
        runs_alone(async {
            let Some((file, mut other_end)) = silent() else { return };
            let waiting: Vec<Reading> = (0..DEPTH).map(|_| read(&file, &BYTE).unwrap()).collect();
            assert!(read(&file, &BYTE).is_none());
            // All at once: more than the kernel does in one turn.
            other_end.write_all(&[7; DEPTH as usize]).unwrap();
            for reading in waiting {
                assert_eq!(reading.await.unwrap().unwrap(), [Bytes::from_static(&[7])]);
            }
            assert!(read(&file, &BYTE).is_some());
        });
    }

    #[test]
    fn when_a_read_is_late_no_other_is_begun() {
        runs_alone(async {
            let Some((file, mut other_end)) = silent() else { return };
            let late = read(&file, &BYTE).unwrap();
            let start = Instant::now();
            let mut others = Vec::new();
            while let Some(other) = (others.len() < DEPTH as usize - 1).then(|| read(&file, &BYTE)).flatten() {
                others.push(other);
                while start.elapsed() < LATE * u32::try_from(others.len()).unwrap() / 8 {
                    yield_now();
                }
            }
            assert!(start.elapsed() >= LATE, "only that it was late spoke against another");
            other_end.write_all(&[7; DEPTH as usize]).unwrap();
            late.await.unwrap().unwrap();
            for other in others {
                other.await.unwrap().unwrap();
            }
            assert!(read(&file, &BYTE).is_some(), "nothing is late any more");
        });
    }

    #[test]
    fn what_is_under_way_when_the_runtime_ends_is_not_waited_for() {
        let mut left = None;
        let mut ends = None;
        runs_alone(async {
            ends = silent();
            left = ends.as_ref().map(|(file, _)| read(file, &BYTE).unwrap());
        });
        let Some((reading, (file, mut other_end))) = left.zip(ends) else { return };
        assert!(reading.blocking_recv().is_err());
        runs_alone(async {
            other_end.write_all(&[7; 2]).unwrap();
            let again = read(&file, &BYTE).expect("a ring of the new runtime");
            assert_eq!(again.await.unwrap().unwrap(), [Bytes::from_static(&[7])]);
        });
    }
}
