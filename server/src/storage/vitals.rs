//! How busy the machine is, from /proc.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Instant};

/// Of the time since the look before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vitals {
    /// Of all cores together, 0 to 100.
    pub cpu_percent: u32,
    /// 0 to 100; 0 also if the disk is not known.
    pub disk_busy_percent: u32,
    pub memory_available_bytes: u64,
    pub network_bytes: u64,
}

/// What only grows, since the machine was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    cpu_busy: u64,
    cpu_all: u64,
    disk_busy_ms: u64,
    network_bytes: u64,
}

#[derive(Debug)]
pub(super) struct Watch {
    /// Major and minor number of the disk of the data directory.
    disk: Option<(u32, u32)>,
    last: Totals,
    at: Instant,
}

impl Watch {
    pub(super) fn new(directory: &Path) -> Self {
        let disk = fs::metadata(directory).ok().map(|found| (libc::major(found.dev()), libc::minor(found.dev())));
        Self { disk, last: totals(disk), at: Instant::now() }
    }

    pub(super) fn look(&mut self) -> Vitals {
        let now = totals(self.disk);
        let elapsed = u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let vitals = since(self.last, now, elapsed);
        (self.last, self.at) = (now, Instant::now());
        Vitals {
            memory_available_bytes: read("/proc/meminfo").and_then(|text| available(&text)).unwrap_or(0),
            ..vitals
        }
    }
}

fn since(last: Totals, now: Totals, elapsed_ms: u64) -> Vitals {
    let percent =
        |part: u64, all: u64| u32::try_from((part * 100).checked_div(all).unwrap_or(0).min(100)).unwrap_or(100);
    Vitals {
        cpu_percent: percent(now.cpu_busy.saturating_sub(last.cpu_busy), now.cpu_all.saturating_sub(last.cpu_all)),
        disk_busy_percent: percent(now.disk_busy_ms.saturating_sub(last.disk_busy_ms), elapsed_ms),
        memory_available_bytes: 0,
        network_bytes: now.network_bytes.saturating_sub(last.network_bytes),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn totals(disk: Option<(u32, u32)>) -> Totals {
    let (cpu_busy, cpu_all) = read("/proc/stat").and_then(|text| cpu(&text)).unwrap_or_default();
    let disk_busy_ms = disk.zip(read("/proc/diskstats")).and_then(|(disk, text)| disk_busy(&text, disk)).unwrap_or(0);
    let network_bytes = read("/proc/net/dev").map_or(0, |text| network(&text));
    Totals { cpu_busy, cpu_all, disk_busy_ms, network_bytes }
}

/// Ticks of all cores, at work and in all: see proc(5).
fn cpu(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|field| field.parse().ok()).collect();
    let (all, idle) = (ticks.iter().sum::<u64>(), ticks.get(3)? + ticks.get(4)?);
    Some((all - idle, all))
}

/// Milliseconds in which the disk was at work: the tenth figure of its line.
fn disk_busy(text: &str, (major, minor): (u32, u32)) -> Option<u64> {
    let is_it = |fields: &Vec<&str>| {
        fields.first() == Some(&major.to_string().as_str()) && fields.get(1) == Some(&minor.to_string().as_str())
    };
    let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(is_it)?;
    fields.get(12)?.parse().ok()
}

/// Received and sent, over all interfaces.
fn network(text: &str) -> u64 {
    let figures = text.lines().filter_map(|line| line.split_once(':')).map(|(_, figures)| figures);
    let of_one = |figures: &str| {
        let figures: Vec<u64> = figures.split_whitespace().map_while(|figure| figure.parse().ok()).collect();
        figures.first().unwrap_or(&0) + figures.get(8).unwrap_or(&0)
    };
    figures.map(of_one).sum()
}

/// Bytes, from /proc/meminfo.
fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_proc() {
        assert_eq!(cpu("cpu  10 20 30 400 50 6 7 8 9 10\ncpu0 1 2\n"), Some((81, 531)));
        assert_eq!(cpu("intr 1\n"), None);
        let disks = "   8       0 sda 1 2 3 4 5 6 7 8 9 1234 11\n   8       1 sda1 1 2 3 4 5 6 7 8 9 77 11\n";
        assert_eq!((disk_busy(disks, (8, 1)), disk_busy(disks, (9, 1))), (Some(77), None));
        let interfaces = "Inter-|   Receive\n face |bytes\n    lo: 100 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0\n  eth0: 30 1 0 0 0 0 0 0 4 0 0 0 0 0 0 0\n";
        assert_eq!(network(interfaces), 334);
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
    }

    #[test]
    fn percentages_are_of_the_time_that_has_passed() {
        let last = Totals { cpu_busy: 10, cpu_all: 100, disk_busy_ms: 5, network_bytes: 7 };
        let now = Totals { cpu_busy: 60, cpu_all: 300, disk_busy_ms: 505, network_bytes: 10 };
        let vitals = since(last, now, 1000);
        assert_eq!((vitals.cpu_percent, vitals.disk_busy_percent, vitals.network_bytes), (25, 50, 3));
        assert_eq!(since(now, now, 1000).cpu_percent, 0);
        assert_eq!(since(now, last, 1000), Vitals::default(), "figures that went back");
    }
}
