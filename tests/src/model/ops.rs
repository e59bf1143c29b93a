//! Operations in filesystem words, how to draw them, and how two systems are compared.

use std::collections::BTreeMap;

use proptest::prelude::*;

/// Extended attributes that operations meet.
const ATTRIBUTES: [&str; 2] = ["user.a", "user.b"];

/// `a/b/c`; empty is the root.
type Path = String;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameKind {
    Replace,
    NoReplace,
    Exchange,
}

/// As setxattr(2)'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrKind {
    Set,
    Create,
    Replace,
}

/// Seconds and nanoseconds since 1970.
pub type Time = (i64, i64);

/// Times that operations set lie before this, times of real changes after it.
pub const RECENT: i64 = 1_000_000_000;

/// Descriptors that are held across operations.
pub const SLOTS: usize = 2;

/// Never follows a symbolic link in the last place of a path.
#[derive(Clone, Debug)]
pub enum Op {
    /// `O_CREAT | O_EXCL`, then close.
    Create {
        path: Path,
        mode: u32,
    },
    Write {
        path: Path,
        offset: u64,
        length: usize,
        seed: u8,
    },
    Append {
        path: Path,
        length: usize,
        seed: u8,
    },
    Truncate {
        path: Path,
        size: u64,
    },
    Read {
        path: Path,
        offset: u64,
        length: usize,
    },
    /// `FALLOC_FL_PUNCH_HOLE`.
    Punch {
        path: Path,
        offset: u64,
        length: u64,
    },
    /// `copy_file_range` between two files.
    Copy {
        from: Path,
        from_offset: u64,
        to: Path,
        to_offset: u64,
        length: usize,
    },
    Fsync {
        path: Path,
    },
    Mkdir {
        path: Path,
        mode: u32,
    },
    Rmdir {
        path: Path,
    },
    Unlink {
        path: Path,
    },
    Rename {
        from: Path,
        to: Path,
        kind: RenameKind,
    },
    Link {
        from: Path,
        to: Path,
    },
    Symlink {
        target: String,
        path: Path,
    },
    Readlink {
        path: Path,
    },
    Chmod {
        path: Path,
        mode: u32,
    },
    Chown {
        path: Path,
        uid: u32,
        gid: u32,
    },
    /// Of modification.
    SetTime {
        path: Path,
        time: Time,
    },
    MakeSocket {
        path: Path,
        mode: u32,
    },
    /// `FALLOC_FL_ZERO_RANGE`, with `FALLOC_FL_KEEP_SIZE` if it `keeps` the size.
    Zero {
        path: Path,
        offset: u64,
        length: u64,
        keeps: bool,
    },
    SetXattr {
        path: Path,
        name: &'static str,
        value: Vec<u8>,
        kind: XattrKind,
    },
    GetXattr {
        path: Path,
        name: &'static str,
    },
    RemoveXattr {
        path: Path,
        name: &'static str,
    },
    ListXattrs {
        path: Path,
    },
    /// Opens a file and keeps it open, whatever becomes of its name. What the slot held before is closed first.
    Hold {
        slot: usize,
        path: Path,
    },
    HeldWrite {
        slot: usize,
        offset: u64,
        length: usize,
        seed: u8,
    },
    HeldRead {
        slot: usize,
        offset: u64,
        length: usize,
    },
    HeldStat {
        slot: usize,
    },
    Drop {
        slot: usize,
    },
    Stat {
        path: Path,
    },
    List {
        path: Path,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    File,
    Directory,
    Symlink,
    Socket,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Bytes(Vec<u8>),
    Count(u64),
    Target(String),
    /// Size and link count only where they mean the same everywhere: not of directories.
    Stat {
        shape: Shape,
        mode: u32,
        size: u64,
        nlink: u32,
        owner: (u32, u32),
        /// `None`: after `RECENT`.
        modified: Option<Time>,
    },
    Names(Vec<String>),
}

/// Whatever can carry out operations: the model, a mount, the filesystem without a kernel.
pub trait System {
    /// The answer, or an errno.
    fn apply(&mut self, op: &Op) -> Result<Answer, i32>;
}

/// The bytes that a write of `seed` leaves.
pub fn payload(seed: u8, length: usize) -> Vec<u8> {
    let low = |number: usize| u8::try_from(number % 251).expect("below 251");
    (0..length).map(|at| seed.wrapping_mul(31).wrapping_add(low(at)).wrapping_add(low(at >> 12))).collect()
}

/// Applies every operation to both, and compares each answer and then everything that can be seen.
pub fn check(model: &mut dyn System, subject: &mut dyn System, ops: &[Op]) -> Result<(), TestCaseError> {
    check_answers(model, subject, ops)?;
    compare_trees(model, subject)
}

/// Applies every operation to both, and compares each answer.
pub fn check_answers(model: &mut dyn System, subject: &mut dyn System, ops: &[Op]) -> Result<(), TestCaseError> {
    for (number, op) in ops.iter().enumerate() {
        let (expected, found) = (model.apply(op), subject.apply(op));
        prop_assert!(expected == found, "operation {number}, {op:?}: {} instead of {}", show(&found), show(&expected));
    }
    Ok(())
}

/// Every file, link and directory of both, compared.
fn compare_trees(model: &mut dyn System, subject: &mut dyn System) -> Result<(), TestCaseError> {
    let (expected, found) = (see(model), see(subject));
    for (path, right) in &expected {
        let other = found.get(path);
        prop_assert!(other == Some(right), "{path:?} is {other:?} instead of {right:?}");
    }
    prop_assert_eq!(expected.len(), found.len());
    Ok(())
}

fn show(answer: &Result<Answer, i32>) -> String {
    match answer {
        Ok(Answer::Bytes(bytes)) => {
            format!("{} bytes, {}", bytes.len(), blake3::hash(bytes).to_hex().split_at(8).0)
        }
        Ok(answer) => format!("{answer:?}"),
        Err(errno) => std::io::Error::from_raw_os_error(*errno).to_string(),
    }
}

/// By path: what stat says, and a hash of the content.
fn see(system: &mut dyn System) -> BTreeMap<Path, String> {
    let mut seen = BTreeMap::new();
    let mut waiting = vec![Path::new()];
    while let Some(path) = waiting.pop() {
        let stat = system.apply(&Op::Stat { path: path.clone() });
        let mut text = show(&stat);
        match stat {
            Ok(Answer::Stat { shape: Shape::Directory, .. }) => {
                let names = system.apply(&Op::List { path: path.clone() });
                let Ok(Answer::Names(names)) = names else { panic!("cannot list {path:?}: {}", show(&names)) };
                waiting.extend(names.iter().map(|name| join(&path, name)));
            }
            Ok(Answer::Stat { shape: Shape::File, size, .. }) => {
                let length = usize::try_from(size).expect("test files are small");
                text += &show(&system.apply(&Op::Read { path: path.clone(), offset: 0, length }));
            }
            _ => text += &show(&system.apply(&Op::Readlink { path: path.clone() })),
        }
        let names = system.apply(&Op::ListXattrs { path: path.clone() });
        for name in ATTRIBUTES
            .into_iter()
            .filter(|name| matches!(&names, Ok(Answer::Names(names)) if names.iter().any(|n| n == name)))
        {
            text += &format!(" {name} {}", show(&system.apply(&Op::GetXattr { path: path.clone(), name })));
        }
        seen.insert(path, text);
    }
    seen
}

fn join(directory: &str, name: &str) -> Path {
    if directory.is_empty() { name.into() } else { format!("{directory}/{name}") }
}

/// Few names, so that operations meet each other.
fn path() -> impl Strategy<Value = Path> {
    proptest::collection::vec(proptest::sample::select(vec!["a", "b", "c"]), 1..=3).prop_map(|names| names.join("/"))
}

/// Around the edges of pages, hash groups and chunks.
fn offset() -> impl Strategy<Value = u64> {
    let edges = vec![0u64, 1, 4096, 16_384, 65_536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2 << 20];
    prop_oneof![proptest::sample::select(edges), 0u64..(5 << 19)]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..300,
        2 => proptest::sample::select(vec![4095usize, 4096, 4097, 16_384, 131_072]),
        1 => (1usize << 19)..(5 << 18),
    ]
}

fn mode() -> impl Strategy<Value = u32> {
    proptest::sample::select(vec![0o644u32, 0o600, 0o755, 0o444, 0o777])
}

fn attribute() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(ATTRIBUTES.to_vec())
}

fn xattr_kind() -> impl Strategy<Value = XattrKind> {
    proptest::sample::select(vec![XattrKind::Set, XattrKind::Set, XattrKind::Create, XattrKind::Replace])
}

fn rename_kind() -> impl Strategy<Value = RenameKind> {
    proptest::sample::select(vec![
        RenameKind::Replace,
        RenameKind::Replace,
        RenameKind::NoReplace,
        RenameKind::Exchange,
    ])
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![6 => on_names_and_data(), 2 => on_attributes(), 1 => on_descriptors()]
}

/// What close-to-open coherence promises without a lock: on the data of files whose names stay.
fn on_data() -> impl Strategy<Value = Op> {
    let path = || proptest::sample::select(vec!["a", "b", "c"]).prop_map(String::from);
    prop_oneof![
        6 => (path(), offset(), length(), any::<u8>())
            .prop_map(|(path, offset, length, seed)| Op::Write { path, offset, length, seed }),
        3 => (path(), length(), any::<u8>()).prop_map(|(path, length, seed)| Op::Append { path, length, seed }),
        2 => (path(), offset()).prop_map(|(path, size)| Op::Truncate { path, size }),
        8 => (path(), offset(), length()).prop_map(|(path, offset, length)| Op::Read { path, offset, length }),
        1 => (path(), offset(), 1u64..300_000).prop_map(|(path, offset, length)| Op::Punch { path, offset, length }),
        1 => (path(), offset(), path(), offset(), length()).prop_map(|(from, from_offset, to, to_offset, length)| {
            Op::Copy { from, from_offset, to, to_offset, length }
        }),
        1 => path().prop_map(|path| Op::Fsync { path }),
    ]
}

/// Up to `most` operations on the data of files `a`, `b` and `c`, which are there.
pub fn data_ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(on_data(), 1..=most)
}

fn on_attributes() -> impl Strategy<Value = Op> {
    let value = || (any::<u8>(), 0usize..200).prop_map(|(seed, length)| payload(seed, length));
    prop_oneof![
        2 => (path(), 0u32..3, 0u32..3).prop_map(|(path, uid, gid)| Op::Chown { path, uid, gid }),
        3 => (path(), -5..RECENT, 0i64..1_000_000_000)
            .prop_map(|(path, seconds, nanos)| Op::SetTime { path, time: (seconds, nanos) }),
        3 => (path(), attribute(), value(), xattr_kind())
            .prop_map(|(path, name, value, kind)| Op::SetXattr { path, name, value, kind }),
        2 => (path(), attribute()).prop_map(|(path, name)| Op::GetXattr { path, name }),
        2 => (path(), attribute()).prop_map(|(path, name)| Op::RemoveXattr { path, name }),
        1 => path().prop_map(|path| Op::ListXattrs { path }),
        1 => (path(), mode()).prop_map(|(path, mode)| Op::MakeSocket { path, mode }),
    ]
}

fn on_descriptors() -> impl Strategy<Value = Op> {
    let slot = || 0..SLOTS;
    prop_oneof![
        3 => (slot(), path()).prop_map(|(slot, path)| Op::Hold { slot, path }),
        3 => (slot(), offset(), length(), any::<u8>())
            .prop_map(|(slot, offset, length, seed)| Op::HeldWrite { slot, offset, length, seed }),
        3 => (slot(), offset(), length()).prop_map(|(slot, offset, length)| Op::HeldRead { slot, offset, length }),
        2 => slot().prop_map(|slot| Op::HeldStat { slot }),
        1 => slot().prop_map(|slot| Op::Drop { slot }),
    ]
}

fn on_names_and_data() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (path(), mode()).prop_map(|(path, mode)| Op::Create { path, mode }),
        8 => (path(), offset(), length(), any::<u8>())
            .prop_map(|(path, offset, length, seed)| Op::Write { path, offset, length, seed }),
        3 => (path(), length(), any::<u8>()).prop_map(|(path, length, seed)| Op::Append { path, length, seed }),
        3 => (path(), offset()).prop_map(|(path, size)| Op::Truncate { path, size }),
        6 => (path(), offset(), length()).prop_map(|(path, offset, length)| Op::Read { path, offset, length }),
        2 => (path(), offset(), 1u64..300_000).prop_map(|(path, offset, length)| Op::Punch { path, offset, length }),
        1 => (path(), offset(), 1u64..300_000, any::<bool>())
            .prop_map(|(path, offset, length, keeps)| Op::Zero { path, offset, length, keeps }),
        2 => (path(), offset(), path(), offset(), length()).prop_map(|(from, from_offset, to, to_offset, length)| {
            Op::Copy { from, from_offset, to, to_offset, length }
        }),
        2 => path().prop_map(|path| Op::Fsync { path }),
        5 => (path(), mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        2 => path().prop_map(|path| Op::Rmdir { path }),
        3 => path().prop_map(|path| Op::Unlink { path }),
        4 => (path(), path(), rename_kind()).prop_map(|(from, to, kind)| Op::Rename { from, to, kind }),
        3 => (path(), path()).prop_map(|(from, to)| Op::Link { from, to }),
        2 => (0u8..9, path()).prop_map(|(n, path)| Op::Symlink { target: format!("missing-{n}"), path }),
        1 => path().prop_map(|path| Op::Readlink { path }),
        2 => (path(), mode()).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        3 => path().prop_map(|path| Op::Stat { path }),
        2 => path().prop_map(|path| Op::List { path }),
    ]
}

/// Up to `most` operations on a tree that is empty.
pub fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 1..=most)
}
