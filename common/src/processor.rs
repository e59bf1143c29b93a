//! Keeps a busy thread on the processor whose caches know it, for as long as it does not have to wait for that one.
//!
//! The kernel wakes a thread on any processor that is idle. One that is woken for each request and sleeps after it then moves with
//! nearly each, begins with cold caches, and takes half as long again. So such a thread binds itself to where it is, looks several times a
//! second what it has waited for that processor (`/proc/thread-self/schedstat`), and lets go of it as soon as that was long.
#![allow(unsafe_code, reason = "direct system calls, each with its own SAFETY line")]

use std::{
    fs, io, mem,
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Between two looks of a thread that is busy, and of one that is not.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOK_EVERY_IDLE: Duration = Duration::from_millis(500);
/// A thread is busy that runs for this part of the time, in percent.
const BUSY_PERCENT: u128 = 5;
/// A thread that has waited for its processor for this part of the time may be better off elsewhere.
const CROWDED_PERCENT: u128 = 10;
/// Looks after which a thread that was crowded tries again.
const FREE_LOOKS: u32 = 20;

/// The processors that this process may use.
static ALLOWED: OnceLock<Processors> = OnceLock::new();

/// Goes on until it is dropped. To be run on the thread that it is about, and on no other: in a runtime of one thread. New threads of
/// that runtime have to [`roam`] when they start, for they inherit where it is bound to.
pub async fn stay_warm() {
    let mut thread = match Resident::new() {
        Ok(Some(thread)) => thread,
        Ok(None) => return,
        Err(error) => return tracing::debug!(%error, "the thread is left to the kernel: its waiting cannot be seen"),
    };
    let mut pause = LOOK_EVERY;
    loop {
        tokio::time::sleep(pause).await;
        match thread.look() {
            Ok(busy) => pause = if busy { LOOK_EVERY } else { LOOK_EVERY_IDLE },
            Err(error) => return tracing::debug!(%error, "the thread is left to the kernel"),
        }
    }
}

/// Lets the calling thread run on any processor that the process may use.
pub fn roam() {
    if let Some(allowed) = ALLOWED.get()
        && let Err(error) = allowed.bind()
    {
        tracing::debug!(%error, "a thread stays where its parent was");
    }
}

#[derive(Clone, Copy)]
struct Processors(libc::cpu_set_t);

impl PartialEq for Processors {
    fn eq(&self, other: &Self) -> bool {
        // SAFETY: reads both sets.
        unsafe { libc::CPU_EQUAL(&self.0, &other.0) }
    }
}

impl Processors {
    const NONE: Self = {
        // SAFETY: zeroes are a valid, empty set.
        Self(unsafe { mem::zeroed() })
    };

    /// Of the calling thread.
    fn current() -> io::Result<Self> {
        // SAFETY: zeroes are a valid, empty set, and the kernel writes no more than its size into it.
        let (set, result) = unsafe {
            let mut set: libc::cpu_set_t = mem::zeroed();
            let result = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
            (set, result)
        };
        if result == 0 { Ok(Self(set)) } else { Err(io::Error::last_os_error()) }
    }

    /// The one that the calling thread is on.
    fn here() -> io::Result<Self> {
        // SAFETY: takes nothing.
        let processor = usize::try_from(unsafe { libc::sched_getcpu() }).map_err(|_| io::Error::last_os_error())?;
        if processor >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(io::Error::other("there are more processors than a set can name"));
        }
        // SAFETY: zeroes are a valid, empty set; the index is within it.
        let set = unsafe {
            let mut set: libc::cpu_set_t = mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            set
        };
        Ok(Self(set))
    }

    fn count(&self) -> i32 {
        // SAFETY: reads the set.
        unsafe { libc::CPU_COUNT(&self.0) }
    }

    /// Has the calling thread run on these alone.
    fn bind(&self) -> io::Result<()> {
        // SAFETY: the kernel reads the set, of the size that is told.
        let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const self.0) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// What the calling thread has done since it began.
#[derive(Clone, Copy)]
struct Spent {
    at: Instant,
    ran: Duration,
    /// Ready to run, while others ran.
    waited: Duration,
}

impl Spent {
    fn now() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/thread-self/schedstat")?;
        let mut fields = text.split_ascii_whitespace().map(|field| field.parse().map(Duration::from_nanos));
        match (fields.next(), fields.next()) {
            (Some(Ok(ran)), Some(Ok(waited))) => Ok(Self { at: Instant::now(), ran, waited }),
            _ => Err(io::Error::other(format!("schedstat is not what it was: {text}"))),
        }
    }
}

/// The thread that called [`Resident::new`].
struct Resident {
    allowed: Processors,
    bound: Option<Processors>,
    habit: Habit,
    spent: Spent,
}

impl Resident {
    /// `None`: there is only one processor.
    fn new() -> io::Result<Option<Self>> {
        let allowed = *ALLOWED.get_or_init(|| Processors::current().unwrap_or(Processors::NONE));
        if allowed.count() < 2 {
            return Ok(None);
        }
        Ok(Some(Self { allowed, bound: None, habit: Habit::default(), spent: Spent::now()? }))
    }

    /// Binds or frees the thread. Returns whether it is busy.
    fn look(&mut self) -> io::Result<bool> {
        let now = Spent::now()?;
        let (time, ran) = (now.at - self.spent.at, now.ran.saturating_sub(self.spent.ran));
        let waited = now.waited.saturating_sub(self.spent.waited);
        self.spent = now;
        // Somebody else may have said where the thread has to run: that holds from now on.
        let current = Processors::current()?;
        if current != self.bound.unwrap_or(self.allowed) {
            (self.allowed, self.bound) = (current, None);
        }
        match (self.habit.look(time, ran, waited), self.bound) {
            (Some(true), None) if self.allowed.count() > 1 => {
                let here = Processors::here()?;
                here.bind()?;
                self.bound = Some(here);
            }
            (Some(false), Some(_)) => {
                self.allowed.bind()?;
                self.bound = None;
            }
            _ => {}
        }
        Ok(is_part(ran, time, BUSY_PERCENT))
    }
}

/// Whether a thread should be bound: decides, and does nothing.
#[derive(Debug, Default)]
struct Habit {
    free_looks: u32,
}

impl Habit {
    /// `time` has passed, in which the thread `ran`, and `waited` for its processor. `None`: as it was.
    fn look(&mut self, time: Duration, ran: Duration, waited: Duration) -> Option<bool> {
        self.free_looks = self.free_looks.saturating_sub(1);
        if is_part(waited, time, CROWDED_PERCENT) {
            self.free_looks = FREE_LOOKS;
            return Some(false);
        }
        (is_part(ran, time, BUSY_PERCENT) && self.free_looks == 0).then_some(true)
    }
}

/// Is `part` at least so many percent of `whole`?
fn is_part(part: Duration, whole: Duration, percent: u128) -> bool {
    part.as_nanos() * 100 >= whole.as_nanos() * percent
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn look(habit: &mut Habit, ran_ms: u64, waited_ms: u64) -> Option<bool> {
        habit.look(SECOND, Duration::from_millis(ran_ms), Duration::from_millis(waited_ms))
    }

    #[test]
    fn who_is_busy_stays_and_who_is_crowded_is_free_for_a_while() {
        let mut habit = Habit::default();
        assert_eq!(look(&mut habit, 10, 0), None, "idle");
        assert_eq!(look(&mut habit, 400, 50), Some(true), "busy");
        assert_eq!(look(&mut habit, 400, 200), Some(false), "crowded");
        for _ in 1..FREE_LOOKS {
            assert_eq!(look(&mut habit, 400, 0), None, "it was crowded a moment ago");
        }
        assert_eq!(look(&mut habit, 400, 0), Some(true));
        assert_eq!(look(&mut habit, 10, 500), Some(false), "crowded, and hardly ever its turn");
    }

    /// Runs until `resident` has looked, busy for the whole time since the look before.
    fn look_busily(resident: &mut Resident) -> bool {
        let begun = resident.spent.ran;
        while Spent::now().unwrap().ran < begun + Duration::from_millis(20) {}
        resident.look().unwrap()
    }

    #[test]
    fn a_busy_thread_is_bound_to_one_processor_and_its_children_roam() {
        let before = Processors::current().unwrap();
        let Some(mut resident) = Resident::new().unwrap() else { return assert_eq!(before.count(), 1) };
        // Other tests may run beside this one: not crowded, sooner or later.
        while resident.bound.is_none() {
            resident.habit.free_looks = 0;
            look_busily(&mut resident);
        }
        assert_eq!(Processors::current().unwrap().count(), 1);
        let (inherited, roaming) = thread::spawn(|| {
            let inherited = Processors::current().unwrap().count();
            roam();
            (inherited, Processors::current().unwrap().count())
        })
        .join()
        .unwrap();
        assert_eq!((inherited, roaming), (1, before.count()));
        // Whoever says where it has to run is obeyed.
        before.bind().unwrap();
        resident.habit.free_looks = FREE_LOOKS;
        resident.look().unwrap();
        assert!(resident.bound.is_none() && Processors::current().unwrap() == before);
    }
}
