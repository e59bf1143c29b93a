//! What each process can be told: TOML keys that are also flags, and what they come to.
//!
//! `XOptions` is what was said, in a file or on the command line; `XConfig` is what holds, checked and complete. A flag wins
//! over the file. Relative paths in a file are relative to the file.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use crate::telemetry::{LogFormat, LogLevel};

/// Where a metadata server listens unless told otherwise.
pub const META_PORT: u16 = 7400;
/// Where a storage server listens unless told otherwise.
pub const STORAGE_PORT: u16 = 7401;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration {path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {message}")]
    Syntax { path: PathBuf, line: usize, message: String },
    #[error("`{key}` is not set; give --{flag}, or {key} = ... in the configuration file")]
    Missing { key: &'static str, flag: String },
    #[error("`{key}` is refused: {reason}")]
    Invalid { key: &'static str, reason: String },
}

fn invalid(key: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key, reason: reason.into() }
}

/// Bytes: a number, or a number with KiB, MiB, GiB, TiB (powers of 1024) or KB, MB, GB, TB (powers of 1000).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no size: write 1048576, 256MiB, 1.5GiB or 2TB")]
pub struct ByteSizeError(String);

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, ByteSizeError> {
        parse_size(text.trim()).map(Self).ok_or_else(|| ByteSizeError(text.to_owned()))
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit_bytes(unit.trim())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u64 = whole.parse().ok()?;
    let digits = u32::try_from(fraction.len()).ok().filter(|digits| *digits <= 9)?;
    let fraction: u64 = fraction.parse().ok()?;
    let part = u128::from(fraction) * u128::from(unit) / u128::from(10u64.pow(digits));
    whole.checked_mul(unit)?.checked_add(u64::try_from(part).ok()?)
}

fn unit_bytes(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    })
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 > 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

struct ByteSizeVisitor;

impl de::Visitor<'_> for ByteSizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size in bytes, like 1048576 or \"256MiB\"")
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<ByteSize, E> {
        u64::try_from(value).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<ByteSize, E> {
        value.parse().map_err(E::custom)
    }
}

/// What all options have in common.
trait Options: de::DeserializeOwned + Default {
    /// `self`, and what it leaves open from `other`.
    fn or(self, other: Self) -> Self;
    /// The paths among the options.
    fn paths(&mut self) -> Vec<&mut PathBuf>;
}

/// An option that is a path, or several.
trait Paths {
    fn paths(&mut self) -> &mut [PathBuf];
}

impl Paths for PathBuf {
    fn paths(&mut self) -> &mut [PathBuf] {
        std::slice::from_mut(self)
    }
}

impl Paths for Vec<PathBuf> {
    fn paths(&mut self) -> &mut [PathBuf] {
        self
    }
}

/// One `Option::or` for each field; a field that is forgotten does not compile.
macro_rules! options {
    ($name:ident { $($field:ident),* $(,)? } paths { $($path:ident),* $(,)? }) => {
        impl Options for $name {
            fn or(self, other: Self) -> Self {
                Self { $($field: self.$field.or(other.$field)),* }
            }

            fn paths(&mut self) -> Vec<&mut PathBuf> {
                let mut paths = Vec::new();
                $(paths.extend(self.$path.iter_mut().flat_map(Paths::paths));)*
                paths
            }
        }
    };
}

/// Options of a metadata server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct MetaOptions {
    /// Directory of the metadata: log and tables
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Directory of node.crt, node.key and ca.crt [default: <data_dir>/tls]
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Address and UDP port to listen on [default: 0.0.0.0:7400]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Directory of ca.crt and ca.key; without it, nobody can enrol here
    #[arg(long, value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Memory for the cache of the tables [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    pub cache_bytes: Option<ByteSize>,
    /// Length of the log at which the tables are made durable and the log is dropped [default: 16MiB]
    #[arg(long, value_name = "BYTES")]
    pub checkpoint_log_bytes: Option<ByteSize>,
    /// Space that is left free on the disk of data_dir, so that the tables can still be made durable and things be deleted: with
    /// less, what would make the tables grow is refused. Half of it, 64 MiB at most, is held by a file, which makes room when others
    /// have filled the disk [default: 2 x checkpoint_log_bytes]
    #[arg(long, value_name = "BYTES")]
    pub reserve_bytes: Option<ByteSize>,
    /// Silence after which a mount counts as gone and its open files are released, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub session_timeout_secs: Option<u64>,
    /// How long mounts are waited for after a loss of power, so that they say again what was not yet durable, in seconds
    /// [default: a tenth of session_timeout_secs]
    #[arg(long, value_name = "SECONDS")]
    pub recovery_window_secs: Option<u64>,
    /// Silence after which a storage server is suspect, in milliseconds; longer for one that is heard irregularly, up to half of
    /// down_after_ms [default: 2000]
    #[arg(long, value_name = "MS")]
    pub suspect_after_ms: Option<u64>,
    /// Silence after which a storage server is down, in milliseconds [default: 10000]
    #[arg(long, value_name = "MS")]
    pub down_after_ms: Option<u64>,
    /// How long a storage server has to be down before its blocks are copied to others, in seconds [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub replace_after_secs: Option<u64>,
    /// How long a block is kept that no file names any more, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub garbage_grace_secs: Option<u64>,
    /// How often what a storage server has is compared with what it is on record for, in seconds; and whenever it
    /// has been started anew [default: 3600]
    #[arg(long, value_name = "SECONDS")]
    pub compare_every_secs: Option<u64>,
    /// How often a copy of all metadata is put on the storage servers, in seconds, if there is anything new; 0: never. One that takes
    /// long is made less often [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub backup_every_secs: Option<u64>,
    /// Least serious messages that are logged; HOLDFAST_LOG overrides it [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How messages look [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

options!(MetaOptions {
    data_dir, tls_dir, listen, ca_dir, cache_bytes, checkpoint_log_bytes, reserve_bytes, session_timeout_secs,
    recovery_window_secs, suspect_after_ms, down_after_ms, replace_after_secs, garbage_grace_secs, compare_every_secs,
    backup_every_secs, log_level, log_format,
} paths { data_dir, tls_dir, ca_dir });

/// Options of a storage server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct StorageOptions {
    /// Directory of the blocks: segments and index. Several (give it again; a list in the file), for several disks, are a storage server
    /// each, which fails alone: each with a certificate of its own in <data_dir>/tls, the next ones on the ports that follow
    #[arg(long, value_name = "DIR")]
    #[serde(default, deserialize_with = "one_or_several")]
    pub data_dir: Option<Vec<PathBuf>>,
    /// Directory of node.crt, node.key and ca.crt [default: <data_dir>/tls]
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Address and UDP port to listen on [default: 0.0.0.0:7401]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address at which others reach this server [default: listen, unless that is 0.0.0.0 or ::]
    #[arg(long, value_name = "IP:PORT")]
    pub advertise: Option<SocketAddr>,
    /// The metadata server, as host:port or ip:port
    #[arg(long, value_name = "HOST:PORT")]
    pub meta: Option<String>,
    /// Failure domain (rack, room, cloud zone): copies of a block go to distinct ones [default: each server its own; with several data
    /// directories, the machine's name]
    #[arg(long, value_name = "NAME")]
    pub zone: Option<String>,
    /// Most bytes of blocks to keep here, in each data directory [default: the whole disk]
    #[arg(long, value_name = "BYTES")]
    pub capacity_bytes: Option<ByteSize>,
    /// Bytes of the disk to leave free. Half of it, 64 MiB at most, is held by a file, which makes room when others have filled the
    /// disk [default: 1GiB, or 5 % of the disk if that is less]
    #[arg(long, value_name = "BYTES")]
    pub reserve_bytes: Option<ByteSize>,
    /// Length at which a new segment file is begun [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    pub segment_bytes: Option<ByteSize>,
    /// Bytes a second that are read and checked in the background, a quarter of it while requests are served; 0: only when asked for
    /// [default: 16MiB]
    #[arg(long, value_name = "BYTES")]
    pub scrub_rate_bytes: Option<ByteSize>,
    /// From the end of one such pass over everything to the next, in seconds [default: 604800, a week]
    #[arg(long, value_name = "SECONDS")]
    pub scrub_every_secs: Option<u64>,
    /// Memory for the cache of the index [default: 64MiB]
    #[arg(long, value_name = "BYTES")]
    pub index_cache_bytes: Option<ByteSize>,
    /// Least serious messages that are logged; HOLDFAST_LOG overrides it [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How messages look [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

options!(StorageOptions {
    data_dir, tls_dir, listen, advertise, meta, zone, capacity_bytes, reserve_bytes, segment_bytes, scrub_rate_bytes,
    scrub_every_secs, index_cache_bytes, log_level, log_format,
} paths { data_dir, tls_dir });

impl StorageOptions {
    /// Those of the `number`-th data directory, counted from 0.
    fn nth(&self, number: u16, directory: &Path, zone: &str) -> Result<Self, ConfigError> {
        let listen = self.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], STORAGE_PORT)));
        Ok(Self {
            data_dir: Some(vec![directory.to_owned()]),
            listen: Some(moved("listen", listen, number)?),
            advertise: self.advertise.map(|advertise| moved("advertise", advertise, number)).transpose()?,
            zone: Some(zone.to_owned()),
            ..self.clone()
        })
    }
}

/// The same address, `number` ports further. Port 0, any that is free, stays that.
fn moved(key: &'static str, mut address: SocketAddr, number: u16) -> Result<SocketAddr, ConfigError> {
    if address.port() > 0 {
        let port = address.port().checked_add(number);
        address.set_port(port.ok_or_else(|| invalid(key, "there are not so many ports after this one"))?);
    }
    Ok(address)
}

/// As the kernel knows it.
fn machine_name() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    // That name is no machine's: with it all of them would be one zone.
    Some(name.trim().to_owned()).filter(|name| !name.is_empty() && !name.starts_with("localhost"))
}

fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<PathBuf>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a directory, or a list of directories")]
    enum Given {
        One(PathBuf),
        Several(Vec<PathBuf>),
    }
    Ok(Some(match Given::deserialize(deserializer)? {
        Given::One(directory) => vec![directory],
        Given::Several(directories) => directories,
    }))
}

/// Options of a mount, and of every administrative command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct ClientOptions {
    /// The metadata server, as host:port or ip:port
    #[arg(long, value_name = "HOST:PORT")]
    pub meta: Option<String>,
    /// Directory of node.crt, node.key and ca.crt
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Memory for verified blocks that were read [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    pub cache_bytes: Option<ByteSize>,
    /// Memory for bytes that were written and are not durable yet; writers wait past it (small files past an eighth more), or earlier while fsyncs of little take long [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    pub dirty_bytes: Option<ByteSize>,
    /// How long a write or read is retried while too few servers answer, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub io_timeout_secs: Option<u64>,
    /// Whether a block of 32 KiB and more goes to one server that passes it on to the others [default: auto: if none of them is on this machine]
    #[arg(long, value_name = "WHEN")]
    pub relay: Option<Relaying>,
    /// Least serious messages that are logged; HOLDFAST_LOG overrides it [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How messages look [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

options!(ClientOptions {
    meta, tls_dir, cache_bytes, dirty_bytes, io_timeout_secs, relay, log_level, log_format,
} paths { tls_dir });

/// What holds for a metadata server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaConfig {
    pub data_dir: PathBuf,
    pub tls_dir: PathBuf,
    pub listen: SocketAddr,
    pub ca_dir: Option<PathBuf>,
    pub cache_bytes: u64,
    pub checkpoint_log_bytes: u64,
    /// Of the disk of `data_dir`, left free.
    pub reserve_bytes: u64,
    pub session_timeout: Duration,
    /// How long mounts are waited for after a loss of power.
    pub recovery_window: Duration,
    pub suspect_after: Duration,
    pub down_after: Duration,
    /// A storage server that has been down for so long is replaced.
    pub replace_after: Duration,
    pub garbage_grace: Duration,
    pub compare_every: Duration,
    /// Zero: never.
    pub backup_every: Duration,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
}

impl MetaConfig {
    /// What `flags` say, then what `file` says, then the defaults.
    pub fn load(file: Option<&Path>, flags: MetaOptions) -> Result<Self, ConfigError> {
        Self::resolve(merge(file, flags)?)
    }

    pub fn resolve(options: MetaOptions) -> Result<Self, ConfigError> {
        let data_dir = required("data_dir", options.data_dir)?;
        let session_timeout = seconds("session_timeout_secs", options.session_timeout_secs, 60, 5)?;
        let window = session_timeout.as_secs() / 10;
        let checkpoint_log_bytes = size("checkpoint_log_bytes", options.checkpoint_log_bytes, 16 * MIB, MIB)?;
        let config = Self {
            tls_dir: options.tls_dir.unwrap_or_else(|| data_dir.join("tls")),
            data_dir,
            listen: options.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], META_PORT))),
            ca_dir: options.ca_dir,
            cache_bytes: size("cache_bytes", options.cache_bytes, 256 * MIB, MIB)?,
            checkpoint_log_bytes,
            reserve_bytes: options.reserve_bytes.map_or(2 * checkpoint_log_bytes, |reserve| reserve.0),
            session_timeout,
            recovery_window: seconds("recovery_window_secs", options.recovery_window_secs, window.max(1), 1)?,
            suspect_after: milliseconds("suspect_after_ms", options.suspect_after_ms, 2_000)?,
            down_after: milliseconds("down_after_ms", options.down_after_ms, 10_000)?,
            replace_after: seconds("replace_after_secs", options.replace_after_secs, 300, 1)?,
            garbage_grace: seconds("garbage_grace_secs", options.garbage_grace_secs, 60, 1)?,
            compare_every: seconds("compare_every_secs", options.compare_every_secs, 3600, 1)?,
            backup_every: seconds("backup_every_secs", options.backup_every_secs, 600, 0)?,
            log_level: options.log_level.unwrap_or_default(),
            log_format: options.log_format.unwrap_or_default(),
        };
        if config.suspect_after >= config.down_after {
            return Err(invalid("suspect_after_ms", "it must be less than `down_after_ms`"));
        }
        Ok(config)
    }
}

/// What holds for a storage server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageConfig {
    pub data_dir: PathBuf,
    pub tls_dir: PathBuf,
    pub listen: SocketAddr,
    /// Port 0 as in `listen`: the one that was bound, see [`StorageConfig::advertised`].
    pub advertise: SocketAddr,
    pub meta: SocketAddr,
    pub zone: String,
    /// `None`: the whole disk.
    pub capacity_bytes: Option<u64>,
    /// `None`: see [`StorageConfig::reserve`].
    pub reserve_bytes: Option<u64>,
    pub segment_bytes: u64,
    /// 0: only when it is asked for.
    pub scrub_rate_bytes: u64,
    pub scrub_every: Duration,
    pub index_cache_bytes: u64,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
}

impl StorageConfig {
    /// What `flags` say, then what `file` says, then the defaults, for each data directory.
    pub fn load(file: Option<&Path>, flags: StorageOptions) -> Result<Vec<Self>, ConfigError> {
        Self::resolve_all(merge(file, flags)?)
    }

    /// A storage server for each data directory; at least one.
    pub fn resolve_all(options: StorageOptions) -> Result<Vec<Self>, ConfigError> {
        let directories = required("data_dir", options.data_dir.clone().filter(|directories| !directories.is_empty()))?;
        if directories.len() == 1 {
            return Ok(vec![Self::resolve(options)?]);
        }
        if options.tls_dir.is_some() {
            return Err(invalid("tls_dir", "of several data directories each has its certificate in <data_dir>/tls"));
        }
        let distinct: BTreeSet<&PathBuf> = directories.iter().collect();
        if distinct.len() < directories.len() {
            return Err(invalid("data_dir", "one of them is given twice"));
        }
        let zone = match &options.zone {
            Some(zone) => zone.clone(),
            None => machine_name().ok_or_else(|| invalid("zone", "this machine has no name: say which zone it is"))?,
        };
        (0u16..)
            .zip(&directories)
            .map(|(number, directory)| Self::resolve(options.nth(number, directory, &zone)?))
            .collect()
    }

    fn resolve(options: StorageOptions) -> Result<Self, ConfigError> {
        let data_dir = required("data_dir", options.data_dir.and_then(|directories| directories.into_iter().next()))?;
        let listen = options.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], STORAGE_PORT)));
        Ok(Self {
            tls_dir: options.tls_dir.unwrap_or_else(|| data_dir.join("tls")),
            data_dir,
            listen,
            advertise: advertise(listen, options.advertise)?,
            meta: resolve_address("meta", &required("meta", options.meta)?)?,
            zone: options.zone.unwrap_or_default(),
            capacity_bytes: options.capacity_bytes.map(|limit| limit.0),
            reserve_bytes: options.reserve_bytes.map(|reserve| reserve.0),
            segment_bytes: size("segment_bytes", options.segment_bytes, 256 * MIB, 8 * MIB)?,
            scrub_rate_bytes: options.scrub_rate_bytes.map_or(16 * MIB, |rate| rate.0),
            scrub_every: seconds("scrub_every_secs", options.scrub_every_secs, 604_800, 1)?,
            index_cache_bytes: size("index_cache_bytes", options.index_cache_bytes, 64 * MIB, MIB)?,
            log_level: options.log_level.unwrap_or_default(),
            log_format: options.log_format.unwrap_or_default(),
        })
    }

    /// What to tell others, once `bound` is known.
    pub fn advertised(&self, bound: SocketAddr) -> SocketAddr {
        match self.advertise.port() {
            0 => SocketAddr::new(self.advertise.ip(), bound.port()),
            _ => self.advertise,
        }
    }

    /// Bytes to leave free on a disk of `capacity` bytes.
    pub fn reserve(&self, capacity: u64) -> u64 {
        self.reserve_bytes.unwrap_or_else(|| GIB.min(capacity / 20))
    }
}

/// Whether long blocks go to one server that passes them on to the others. That takes two encryptions of three from the mount, and two
/// thirds of what its network sends, and gives them to the servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Relaying {
    /// If none of the servers is on the mount's machine.
    #[default]
    Auto,
    /// Even then.
    Always,
    Never,
}

/// What holds for a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    pub meta: SocketAddr,
    pub tls_dir: PathBuf,
    pub cache_bytes: u64,
    pub dirty_bytes: u64,
    pub io_timeout: Duration,
    pub relay: Relaying,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
}

impl ClientConfig {
    /// What `flags` say, then what `file` says, then the defaults.
    pub fn load(file: Option<&Path>, flags: ClientOptions) -> Result<Self, ConfigError> {
        Self::resolve(merge(file, flags)?)
    }

    pub fn resolve(options: ClientOptions) -> Result<Self, ConfigError> {
        Ok(Self {
            meta: resolve_address("meta", &required("meta", options.meta)?)?,
            tls_dir: required("tls_dir", options.tls_dir)?,
            cache_bytes: size("cache_bytes", options.cache_bytes, 256 * MIB, 4 * MIB)?,
            dirty_bytes: size("dirty_bytes", options.dirty_bytes, 256 * MIB, 8 * MIB)?,
            io_timeout: seconds("io_timeout_secs", options.io_timeout_secs, 60, 1)?,
            relay: options.relay.unwrap_or_default(),
            log_level: options.log_level.unwrap_or_default(),
            log_format: options.log_format.unwrap_or_default(),
        })
    }
}

fn merge<O: Options>(file: Option<&Path>, flags: O) -> Result<O, ConfigError> {
    match file {
        Some(path) => Ok(flags.or(read_options(path)?)),
        None => Ok(flags),
    }
}

fn read_options<O: Options>(path: &Path) -> Result<O, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let mut options: O = toml::from_str(&text).map_err(|error| syntax_error(path, &text, &error))?;
    let base = path.parent().unwrap_or(Path::new(""));
    for given in options.paths() {
        *given = base.join(&*given);
    }
    Ok(options)
}

fn syntax_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
    let line = 1 + before.bytes().filter(|byte| *byte == b'\n').count();
    ConfigError::Syntax { path: path.to_owned(), line, message: error.message().to_owned() }
}

fn required<T>(key: &'static str, value: Option<T>) -> Result<T, ConfigError> {
    value.ok_or_else(|| ConfigError::Missing { key, flag: key.replace('_', "-") })
}

fn size(key: &'static str, value: Option<ByteSize>, default: u64, least: u64) -> Result<u64, ConfigError> {
    match value.map_or(default, |size| size.0) {
        bytes if bytes < least => Err(invalid(key, format!("{} is less than {}", ByteSize(bytes), ByteSize(least)))),
        bytes => Ok(bytes),
    }
}

fn seconds(key: &'static str, value: Option<u64>, default: u64, least: u64) -> Result<Duration, ConfigError> {
    match value.unwrap_or(default) {
        secs if secs < least => Err(invalid(key, format!("{secs} s is less than {least} s"))),
        secs => Ok(Duration::from_secs(secs)),
    }
}

fn milliseconds(key: &'static str, value: Option<u64>, default: u64) -> Result<Duration, ConfigError> {
    match value.unwrap_or(default) {
        ms if ms < 100 => Err(invalid(key, format!("{ms} ms is less than 100 ms"))),
        ms => Ok(Duration::from_millis(ms)),
    }
}

fn advertise(listen: SocketAddr, told: Option<SocketAddr>) -> Result<SocketAddr, ConfigError> {
    let address = told.unwrap_or(listen);
    if address.ip().is_unspecified() {
        let reason =
            format!("{address} is not an address at which others can reach this server; set it to one that is");
        return Err(invalid("advertise", reason));
    }
    Ok(address)
}

fn resolve_address(key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    let mut addresses = text.to_socket_addrs().map_err(|e| invalid(key, format!("{text:?} is no host:port: {e}")))?;
    addresses.next().ok_or_else(|| invalid(key, format!("{text:?} has no address")))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line<O: clap::Args> {
        #[command(flatten)]
        options: O,
    }

    fn flags<O: clap::Args>(words: &str) -> O {
        Line::<O>::try_parse_from(std::iter::once("test").chain(words.split_whitespace())).unwrap().options
    }

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("holdfast.toml");
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_file_and_line() {
        let (_directory, path) = file("data_dir = \"data\"\n\nlisten_on = \"127.0.0.1:1\"\n");
        let error = MetaConfig::load(Some(&path), MetaOptions::default()).unwrap_err();
        let ConfigError::Syntax { line, message, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*line, 3);
        assert!(message.contains("listen_on"), "{message}");
        assert!(error.to_string().contains("holdfast.toml, line 3"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_an_error_that_names_the_line() {
        for (text, expected) in [
            ("data_dir = \"d\"\ncache_bytes = \"many\"\n", 2),
            ("data_dir = \"d\"\ncache_bytes = -1\n", 2),
            ("log_level = \"loud\"\n", 1),
            ("data_dir = \"d\"\n\n\nlisten = \"nowhere\"\n", 4),
            ("\ndata_dir = = 1\n", 2),
        ] {
            let (_directory, path) = file(text);
            match MetaConfig::load(Some(&path), MetaOptions::default()) {
                Err(ConfigError::Syntax { line, .. }) => assert_eq!(line, expected, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let (_directory, path) = file(
            "meta = \"127.0.0.1:7400\"\ntls_dir = \"/tls\"\ncache_bytes = \"1GiB\"\ndirty_bytes = 16777216\nrelay = \"never\"\n",
        );
        let config = ClientConfig::load(Some(&path), flags("--cache-bytes 64MiB --log-format json")).unwrap();
        assert_eq!(config.cache_bytes, 64 * MIB);
        assert_eq!(config.dirty_bytes, 16 * MIB);
        assert_eq!(config.relay, Relaying::Never);
        assert_eq!(config.io_timeout, Duration::from_secs(60));
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(config.log_level, LogLevel::Info);
    }

    #[test]
    fn relative_paths_of_a_file_are_relative_to_it_and_those_of_flags_are_not() {
        let (directory, path) = file("data_dir = \"data\"\nca_dir = \"../ca\"\ntls_dir = \"/absolute\"\n");
        let config = MetaConfig::load(Some(&path), MetaOptions::default()).unwrap();
        assert_eq!(config.data_dir, directory.path().join("data"));
        assert_eq!(config.ca_dir, Some(directory.path().join("../ca")));
        assert_eq!(config.tls_dir, Path::new("/absolute"));
        let config = MetaConfig::load(Some(&path), flags("--data-dir here --tls-dir there")).unwrap();
        assert_eq!(config.data_dir, Path::new("here"));
        assert_eq!(config.tls_dir, Path::new("there"));
    }

    #[test]
    fn what_is_missing_is_named_as_key_and_as_flag() {
        let error = MetaConfig::resolve(MetaOptions::default()).unwrap_err().to_string();
        assert!(error.contains("`data_dir`") && error.contains("--data-dir"), "{error}");
    }

    #[test]
    fn a_server_that_listens_everywhere_must_say_where_it_is_reached() {
        let base = "--data-dir d --meta 127.0.0.1:7400";
        let refused = StorageConfig::resolve(flags(base)).unwrap_err().to_string();
        assert!(refused.contains("advertise"), "{refused}");
        let config = StorageConfig::resolve(flags(&format!("{base} --advertise 10.0.0.1:7401"))).unwrap();
        assert_eq!(config.advertised(config.listen), ([10, 0, 0, 1], 7401).into());
        let config = StorageConfig::resolve(flags(&format!("{base} --listen 127.0.0.1:0"))).unwrap();
        assert_eq!(config.advertised(([127, 0, 0, 1], 4242).into()), ([127, 0, 0, 1], 4242).into());
    }

    #[test]
    fn nonsense_is_refused_with_the_key_in_the_sentence() {
        for (words, key) in [
            ("--data-dir d --suspect-after-ms 10000", "suspect_after_ms"),
            ("--data-dir d --down-after-ms 1", "down_after_ms"),
            ("--data-dir d --session-timeout-secs 0", "session_timeout_secs"),
            ("--data-dir d --cache-bytes 12", "cache_bytes"),
        ] {
            match MetaConfig::resolve(flags(words)) {
                Err(ConfigError::Invalid { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{words}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_key_of_a_file_is_a_flag() {
        let keys = [
            ("data_dir", "\"/d\""),
            ("tls_dir", "\"/t\""),
            ("listen", "\"127.0.0.1:1\""),
            ("advertise", "\"127.0.0.1:2\""),
            ("meta", "\"127.0.0.1:3\""),
            ("zone", "\"z\""),
            ("capacity_bytes", "\"1TiB\""),
            ("reserve_bytes", "1000"),
            ("segment_bytes", "\"64MiB\""),
            ("index_cache_bytes", "\"32MiB\""),
            ("log_level", "\"debug\""),
            ("log_format", "\"json\""),
        ];
        let text: String = keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let words: String = keys
            .iter()
            .map(|(key, value)| format!("--{} {} ", key.replace('_', "-"), value.trim_matches('"')))
            .collect();
        let (_directory, path) = file(&text);
        let from_file = StorageConfig::load(Some(&path), StorageOptions::default()).unwrap();
        assert_eq!(from_file, [StorageConfig::resolve(flags(&words)).unwrap()]);
        assert_eq!(from_file[0].capacity_bytes, Some(1 << 40));
    }

    #[test]
    fn several_data_directories_are_a_storage_server_each() {
        let (directory, path) =
            file("data_dir = [\"one\", \"/two\"]\nmeta = \"127.0.0.1:1\"\nlisten = \"10.0.0.1:7401\"\n");
        let configs = StorageConfig::load(Some(&path), StorageOptions::default()).unwrap();
        let [one, two] = &configs[..] else { panic!("{configs:?}") };
        assert_eq!((&one.data_dir, &two.data_dir), (&directory.path().join("one"), &PathBuf::from("/two")));
        assert_eq!((&one.tls_dir, &two.tls_dir), (&one.data_dir.join("tls"), &two.data_dir.join("tls")));
        assert_eq!((one.listen.port(), two.listen.port()), (7401, 7402));
        assert_eq!((one.advertise.port(), two.advertise.port()), (7401, 7402));
        assert_eq!(one.zone, two.zone);
        assert!(!one.zone.is_empty(), "copies on the other disk of the same machine are hardly worth having");
        let words = "--data-dir a --data-dir b --meta 127.0.0.1:1 --listen 10.0.0.1:0 --zone z";
        let configs = StorageConfig::resolve_all(flags(words)).unwrap();
        assert!(configs.iter().all(|config| config.zone == "z" && config.listen.port() == 0));
        for (words, key) in [
            ("--data-dir a --data-dir b --tls-dir t", "tls_dir"),
            ("--data-dir a --data-dir a", "data_dir"),
            ("--data-dir a --data-dir b --listen 10.0.0.1:65535", "listen"),
        ] {
            match StorageConfig::resolve_all(flags(&format!("{words} --meta 127.0.0.1:1"))) {
                Err(ConfigError::Invalid { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{words}: {other:?}"),
            }
        }
    }

    #[test]
    fn sizes_are_numbers_with_or_without_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("1048576", Some(MIB)),
            ("256MiB", Some(256 * MIB)),
            ("256 mib", Some(256 * MIB)),
            ("1.5GiB", Some(GIB + GIB / 2)),
            ("2TB", Some(2_000_000_000_000)),
            ("16777216TiB", None),
            ("18446744073709551616", None),
            ("1.5.5G", None),
            ("-1", None),
            ("MiB", None),
            ("", None),
            ("1.", None),
            ("1XiB", None),
        ] {
            assert_eq!(text.parse::<ByteSize>().ok().map(|size| size.0), bytes, "{text}");
        }
        for bytes in [0, 1, 1000, 1024, 3 * MIB, u64::MAX] {
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
    }

    #[test]
    fn the_reserve_is_a_gibibyte_or_a_twentieth() {
        let config = StorageConfig::resolve(flags("--data-dir d --meta 127.0.0.1:1 --listen 127.0.0.1:1")).unwrap();
        assert_eq!(config.reserve(100 * GIB), GIB);
        assert_eq!(config.reserve(GIB), GIB / 20);
    }
}
