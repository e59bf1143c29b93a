//! The words of `-o`, as mount(8), fstab(5) and the command line write them. Pure.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use holdfast_common::config::{ByteSize, Relaying};

use crate::{fs::AccessTimes, fuse::MountFlags};

/// What the words of `-o` come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    pub flags: MountFlags,
    pub allow_other: bool,
    pub access_times: AccessTimes,
    /// First column of `/proc/mounts` instead of what was mounted.
    pub fsname: Option<String>,
    pub io_timeout: Option<Duration>,
    pub cache_bytes: Option<ByteSize>,
    pub dirty_bytes: Option<ByteSize>,
    pub relay: Option<Relaying>,
    pub log_file: Option<PathBuf>,
    /// Words that mean nothing here, kept when the caller is sloppy (`mount -s`).
    pub ignored: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("the mount option {0:?} is unknown")]
    Unknown(String),
    #[error("the mount option {0} needs a value: {0}=...")]
    NoValue(&'static str),
    #[error("the mount option {0} takes no value")]
    Value(String),
    #[error("the mount option io_timeout={0:?} is not a time such as 30, 30s or 5m")]
    Time(String),
    #[error("the mount option relay={0:?} is none of auto, always and never")]
    Relay(String),
    #[error("the mount option {0} is refused: {1}")]
    Size(&'static str, String),
    #[error("a mounted cluster cannot be remounted with other options: unmount it first")]
    Remount,
}

impl MountOptions {
    /// As root like a disk: setuid programs and device files work, and everybody may come in; each can be said otherwise.
    /// Anybody else gets what the setuid helper allows.
    pub fn new(root: bool) -> Self {
        Self {
            flags: MountFlags {
                read_only: false,
                suid: root,
                dev: root,
                exec: true,
                atime: true,
                synchronous: false,
                directories_synchronous: false,
            },
            allow_other: root,
            access_times: AccessTimes::default(),
            fsname: None,
            io_timeout: None,
            cache_bytes: None,
            dirty_bytes: None,
            relay: None,
            log_file: None,
            ignored: Vec::new(),
        }
    }

    /// Adds what a comma-separated list says; later words win. `sloppy`: unknown words are kept aside, not refused.
    pub fn add(&mut self, list: &str, sloppy: bool) -> Result<(), OptionError> {
        list.split(',').map(str::trim).filter(|word| !word.is_empty()).try_for_each(|word| self.add_word(word, sloppy))
    }

    fn add_word(&mut self, word: &str, sloppy: bool) -> Result<(), OptionError> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        if is_for_others(name) {
            self.imply(name);
            return Ok(());
        }
        if let Some(known) = WITH_VALUE.into_iter().find(|known| *known == name && value.is_none()) {
            return Err(OptionError::NoValue(known));
        }
        match (name, value) {
            ("fsname", Some(value)) => self.fsname = Some(value.to_owned()),
            ("log_file", Some(value)) => self.log_file = Some(PathBuf::from(value)),
            ("io_timeout", Some(value)) => self.io_timeout = Some(parse_time(value)?),
            ("cache_bytes", Some(value)) => self.cache_bytes = Some(parse_size("cache_bytes", value)?),
            ("relay", Some(value)) => self.relay = Some(parse_relaying(value)?),
            ("dirty_bytes", Some(value)) => self.dirty_bytes = Some(parse_size("dirty_bytes", value)?),
            (_, None) if self.set_flag(name) => {}
            ("remount", None) => return Err(OptionError::Remount),
            (_, Some(_)) if self.clone().set_flag(name) => return Err(OptionError::Value(name.to_owned())),
            _ if sloppy => self.ignored.push(word.to_owned()),
            _ => return Err(OptionError::Unknown(word.to_owned())),
        }
        Ok(())
    }

    /// `false`: no such flag.
    fn set_flag(&mut self, name: &str) -> bool {
        let flags = &mut self.flags;
        match name {
            "ro" => flags.read_only = true,
            "rw" => flags.read_only = false,
            "suid" => flags.suid = true,
            "nosuid" => flags.suid = false,
            "dev" => flags.dev = true,
            "nodev" => flags.dev = false,
            "exec" => flags.exec = true,
            "noexec" => flags.exec = false,
            "atime" | "relatime" | "norelatime" | "nostrictatime" => self.set_access_times(AccessTimes::Relative),
            "noatime" => self.set_access_times(AccessTimes::Never),
            "strictatime" => self.set_access_times(AccessTimes::Always),
            // Always so: times of access are told once a second, and are on disk with the next barrier.
            "lazytime" | "nolazytime" => {}
            "sync" => flags.synchronous = true,
            "async" => flags.synchronous = false,
            "dirsync" => flags.directories_synchronous = true,
            "allow_other" => self.allow_other = true,
            "noallow_other" => self.allow_other = false,
            // Always so: nobody else checks permissions.
            "default_permissions" => {}
            "defaults" => {
                flags.read_only = false;
                flags.exec = true;
                flags.synchronous = false;
            }
            _ => return false,
        }
        true
    }

    fn set_access_times(&mut self, times: AccessTimes) {
        self.access_times = times;
        // They are kept here, not in the kernel; but who looks at the mount should see it.
        self.flags.atime = times != AccessTimes::Never;
    }

    /// Some words of fstab that are for mount(8) imply flags (mount(8), "user").
    fn imply(&mut self, name: &str) {
        if matches!(name, "user" | "users" | "owner" | "group") {
            self.flags.suid = false;
            self.flags.dev = false;
            self.flags.exec &= !matches!(name, "user" | "users");
        }
    }
}

/// Options that are nothing without a value.
const WITH_VALUE: [&str; 6] = ["fsname", "log_file", "io_timeout", "cache_bytes", "dirty_bytes", "relay"];

fn parse_relaying(text: &str) -> Result<Relaying, OptionError> {
    Relaying::from_str(text, false).map_err(|_| OptionError::Relay(text.to_owned()))
}

fn parse_size(name: &'static str, text: &str) -> Result<ByteSize, OptionError> {
    text.parse().map_err(|error: holdfast_common::config::ByteSizeError| OptionError::Size(name, error.to_string()))
}

/// Words for mount(8), systemd or the kernel's own bookkeeping, which reach the helper all the same.
fn is_for_others(name: &str) -> bool {
    const WORDS: [&str; 12] = [
        "_netdev", "nofail", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group",
        "nogroup",
    ];
    WORDS.contains(&name) || name.starts_with("x-") || name.starts_with("X-") || name == "comment"
}

/// Seconds without a unit; `ms`, `s`, `m` or `h` otherwise.
pub fn parse_time(text: &str) -> Result<Duration, OptionError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || OptionError::Time(text.to_owned());
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let scale_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(scale_ms).map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(list: &str) -> Result<MountOptions, OptionError> {
        let mut options = MountOptions::new(true);
        options.add(list, false)?;
        Ok(options)
    }

    #[test]
    fn each_flag_can_be_said_and_the_last_word_wins() {
        type Flag = fn(&MountOptions) -> bool;
        let cases: [(&str, &str, Flag); 9] = [
            ("ro", "rw", |o| o.flags.read_only),
            ("suid", "nosuid", |o| o.flags.suid),
            ("dev", "nodev", |o| o.flags.dev),
            ("exec", "noexec", |o| o.flags.exec),
            ("atime", "noatime", |o| o.access_times == AccessTimes::Relative),
            ("strictatime", "relatime", |o| o.access_times == AccessTimes::Always),
            ("sync", "async", |o| o.flags.synchronous),
            ("allow_other", "noallow_other", |o| o.allow_other),
            ("dirsync", "", |o| o.flags.directories_synchronous),
        ];
        for (yes, no, flag) in cases {
            assert!(flag(&parsed(yes).unwrap()), "{yes}");
            assert!(flag(&parsed(&format!("{no},{yes}")).unwrap()), "{no},{yes}");
            assert!(no.is_empty() || !flag(&parsed(&format!("{yes},{no}")).unwrap()), "{yes},{no}");
        }
    }

    #[test]
    fn root_gets_a_disk_and_others_a_safe_one() {
        let root = MountOptions::new(true);
        assert!(root.flags.suid && root.flags.dev && root.allow_other);
        let other = MountOptions::new(false);
        assert!(!other.flags.suid && !other.flags.dev && !other.allow_other);
    }

    #[test]
    fn the_words_of_fstab_are_accepted_and_user_implies_safety() {
        let plain =
            parsed("defaults,_netdev,nofail,x-systemd.automount,x-systemd.requires=net.target,comment=a,noauto");
        assert_eq!(plain, Ok(MountOptions::new(true)));
        let user = parsed("user").unwrap();
        assert!(!user.flags.suid && !user.flags.dev && !user.flags.exec);
        assert!(parsed("user,exec,suid").unwrap().flags.suid);
        assert!(parsed("owner").unwrap().flags.exec);
    }

    #[test]
    fn our_own_words_take_values() {
        let options = parsed("fsname=data,io_timeout=90s,log_file=/var/log/h.log,cache_bytes=1GiB").unwrap();
        assert_eq!(options.cache_bytes, Some(ByteSize(1 << 30)));
        assert_eq!((options.dirty_bytes, options.relay), (None, None));
        let relaying = ["auto", "always", "never"].map(|word| parsed(&format!("relay={word}")).unwrap().relay);
        assert_eq!(relaying, [Relaying::Auto, Relaying::Always, Relaying::Never].map(Some));
        assert_eq!(options.fsname.as_deref(), Some("data"));
        assert_eq!(options.io_timeout, Some(Duration::from_secs(90)));
        assert_eq!(options.log_file, Some(PathBuf::from("/var/log/h.log")));
    }

    #[test]
    fn what_makes_no_sense_is_an_error_that_names_it() {
        for (list, message) in [
            ("rw,frobnicate", "the mount option \"frobnicate\" is unknown"),
            ("frobnicate=3", "the mount option \"frobnicate=3\" is unknown"),
            ("ro=1", "the mount option ro takes no value"),
            ("io_timeout", "the mount option io_timeout needs a value: io_timeout=..."),
            ("io_timeout=soon", "the mount option io_timeout=\"soon\" is not a time such as 30, 30s or 5m"),
            ("relay=often", "the mount option relay=\"often\" is none of auto, always and never"),
            ("remount,ro", "a mounted cluster cannot be remounted with other options: unmount it first"),
        ] {
            assert_eq!(parsed(list).unwrap_err().to_string(), message, "{list}");
        }
    }

    #[test]
    fn the_sloppy_ignore_what_they_do_not_know() {
        let mut options = MountOptions::new(true);
        options.add("ro,frobnicate,intr=1", true).unwrap();
        assert!(options.flags.read_only);
        assert_eq!(options.ignored, ["frobnicate", "intr=1"]);
    }

    #[test]
    fn times_have_units() {
        for (text, ms) in [("30", 30_000), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000), ("250ms", 250)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "1d", "1.5s", "99999999999999999999", "18446744073709551615h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
