//! How far something has come that goes on elsewhere: a bar, and how long it may still take.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use super::error::{CliError, CliResult};

const WIDTH: u64 = 30;

/// Something that is watched.
#[derive(Debug)]
pub(super) struct Progress {
    /// The most that was left at once.
    most: u64,
    /// When that was.
    since: Instant,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { most: 0, since: Instant::now() }
    }

    /// So much is left, and `text` says of what; for who watches on a terminal.
    pub(super) fn show(&mut self, text: &str, left: u64) {
        if left > self.most {
            (self.most, self.since) = (left, Instant::now());
        }
        let mut error = io::stderr();
        if error.is_terminal() {
            let rest = rest(self.most, left, self.since.elapsed()).map_or(String::new(), |rest| format!(", {rest}"));
            // Whoever does not see it misses nothing.
            drop(write!(error, "\r{}{text}{rest}\x1b[K{}", bar(self.most, left), if left == 0 { "\n" } else { "" }));
        }
    }
}

/// For who waits, on a terminal or in a log.
pub(super) fn say(sentence: &str) -> CliResult {
    let mut error = io::stderr();
    let line = if error.is_terminal() { format!("\r\x1b[K{sentence}\n") } else { format!("{sentence}\n") };
    error
        .write_all(line.as_bytes())
        .map_err(|source| CliError::new(format!("standard error cannot be written: {source}")))
}

/// How long what is left takes if it goes on as until now. `None`: nothing is done yet, or everything.
fn rest(most: u64, left: u64, took: Duration) -> Option<String> {
    let done = most.saturating_sub(left);
    let millis = (u128::from(left) * took.as_millis()).checked_div(u128::from(done)).filter(|_| left > 0)?;
    Some(about(u64::try_from(millis.div_ceil(1000)).unwrap_or(u64::MAX)))
}

/// A time that is not known exactly.
pub(super) fn about(secs: u64) -> String {
    match secs {
        0..100 => format!("about {secs} s"),
        100..6000 => format!("about {} min", secs.div_ceil(60)),
        _ => format!("about {} h", secs.div_ceil(3600)),
    }
}

fn bar(most: u64, left: u64) -> String {
    let done = u128::from(most.saturating_sub(left));
    let of =
        |whole: u64| u64::try_from((done * u128::from(whole)).checked_div(u128::from(most)).unwrap_or(0)).unwrap_or(0);
    let (filled, percent) = if most == 0 { (WIDTH, 100) } else { (of(WIDTH), of(100)) };
    let cell = |place| if place < filled { '#' } else { ' ' };
    format!("[{}] {percent:3} %  ", (0..WIDTH).map(cell).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_grows_with_what_is_done() {
        assert_eq!(bar(200, 200), format!("[{}]   0 %  ", " ".repeat(30)));
        assert_eq!(bar(200, 100), format!("[{}{}]  50 %  ", "#".repeat(15), " ".repeat(15)));
        assert_eq!(bar(200, 0), format!("[{}] 100 %  ", "#".repeat(30)));
        assert_eq!(bar(0, 0), format!("[{}] 100 %  ", "#".repeat(30)), "there was nothing to do");
    }

    #[test]
    fn what_is_left_takes_as_long_as_what_is_done_did() {
        let took = Duration::from_secs(30);
        assert_eq!(rest(100, 75, took).as_deref(), Some("about 90 s"));
        assert_eq!(rest(100, 100, took), None, "nothing is known");
        assert_eq!(rest(100, 0, took), None, "nothing is left");
        assert_eq!([60, 100, 3600, 86_400].map(about), ["about 60 s", "about 2 min", "about 60 min", "about 24 h"]);
    }
}
