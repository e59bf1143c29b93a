//! Random operations against a model that is simply maps of bytes.

use holdfast_common::limits::CHUNK_SIZE;
use proptest::prelude::*;

use super::{
    BTreeMap, Command, FileCommit, Ino, Kind, Mutated, NewBlock, Op, Piece, Refusal, Sequence, World, block, file,
    make, query,
};
use holdfast_common::{
    Replicas,
    wire::meta::{REPLICAS_ATTRIBUTE, RenameMode, SetAttr, XattrMode},
};

/// One random step. Files and directories are chosen by number among those that exist.
#[derive(Clone, Debug)]
enum Action {
    Make {
        dir: usize,
        name: u8,
        kind: Kind,
    },
    Link {
        file: usize,
        dir: usize,
        name: u8,
    },
    Unlink {
        dir: usize,
        name: u8,
    },
    Rmdir {
        dir: usize,
        name: u8,
    },
    Rename {
        from: usize,
        from_name: u8,
        to: usize,
        to_name: u8,
        mode: RenameMode,
    },
    Write {
        file: usize,
        at: u64,
        length: u32,
        skip: u32,
        seed: u8,
    },
    Truncate {
        file: usize,
        size: u64,
    },
    Punch {
        file: usize,
        at: u64,
        length: u64,
        grow: bool,
    },
    Copy {
        from: usize,
        from_at: u64,
        to: usize,
        to_at: u64,
        length: u64,
    },
    Retry {
        back: u64,
    },
    Reclaim,
    /// 0: the cluster's.
    Replicas {
        node: usize,
        count: usize,
    },
    ClusterReplicas {
        count: usize,
    },
    Follow,
}

/// Offsets crowd around the edges of the first chunks.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0..64u64, (CHUNK_SIZE - 32..CHUNK_SIZE + 32), (2 * CHUNK_SIZE - 32..2 * CHUNK_SIZE + 8)]
}

fn action() -> impl Strategy<Value = Action> {
    let (dir, file, name) = (0..4usize, 0..6usize, 0..5u8);
    let mode = prop_oneof![Just(RenameMode::Replace), Just(RenameMode::NoReplace), Just(RenameMode::Exchange)];
    let kind = prop_oneof![3 => Just(Kind::File), 2 => Just(Kind::Directory), 1 => Just(Kind::Symlink)];
    prop_oneof![
        4 => (dir.clone(), name.clone(), kind).prop_map(|(dir, name, kind)| Action::Make { dir, name, kind }),
        1 => (file.clone(), dir.clone(), name.clone()).prop_map(|(file, dir, name)| Action::Link { file, dir, name }),
        2 => (dir.clone(), name.clone()).prop_map(|(dir, name)| Action::Unlink { dir, name }),
        1 => (dir.clone(), name.clone()).prop_map(|(dir, name)| Action::Rmdir { dir, name }),
        3 => (dir.clone(), name.clone(), dir, name, mode)
            .prop_map(|(from, from_name, to, to_name, mode)| Action::Rename { from, from_name, to, to_name, mode }),
        5 => (file.clone(), offset(), 1..40u32, 0..8u32, 1..20u8)
            .prop_map(|(file, at, length, skip, seed)| Action::Write { file, at, length, skip, seed }),
        2 => (file.clone(), offset()).prop_map(|(file, size)| Action::Truncate { file, size }),
        2 => (file.clone(), offset(), 1..50u64, any::<bool>())
            .prop_map(|(file, at, length, grow)| Action::Punch { file, at, length, grow }),
        3 => (file.clone(), offset(), file, offset(), 1..80u64)
            .prop_map(|(from, from_at, to, to_at, length)| Action::Copy { from, from_at, to, to_at, length }),
        1 => (0..3u64).prop_map(|back| Action::Retry { back }),
        1 => Just(Action::Reclaim),
        2 => (0..8usize, 0..=5usize).prop_map(|(node, count)| Action::Replicas { node, count }),
        1 => (1..=5usize).prop_map(|count| Action::ClusterReplicas { count }),
        2 => Just(Action::Follow),
    ]
}

/// Bytes of a block: known from its seed alone.
fn byte_of(seed: u8, at: u32) -> u8 {
    u8::try_from((u32::from(seed) * 37 + at * 11) % 251).unwrap() + 1
}

const BLOCK_LENGTH: u32 = 64;

#[derive(Clone, Default)]
struct Node {
    directory: bool,
    file: bool,
    size: u64,
    /// Only bytes that were written; all others read as zero.
    bytes: BTreeMap<u64, u8>,
    names: BTreeMap<Vec<u8>, Ino>,
    replicas: Replicas,
}

#[derive(Default)]
struct Model {
    nodes: BTreeMap<Ino, Node>,
}

impl Model {
    fn dirs(&self) -> Vec<Ino> {
        self.nodes.iter().filter(|(_, node)| node.directory).map(|(ino, _)| *ino).collect()
    }

    fn files(&self) -> Vec<Ino> {
        self.nodes.iter().filter(|(_, node)| node.file).map(|(ino, _)| *ino).collect()
    }

    fn named(&self, dir: Ino, name: &[u8]) -> Result<Ino, Refusal> {
        self.nodes[&dir].names.get(name).copied().ok_or(Refusal::NotFound)
    }

    fn links(&self, ino: Ino) -> usize {
        self.nodes.values().flat_map(|node| node.names.values()).filter(|named| **named == ino).count()
    }

    fn forget_nameless(&mut self) {
        let gone: Vec<Ino> =
            self.nodes.keys().copied().filter(|ino| *ino != Ino::ROOT && self.links(*ino) == 0).collect();
        gone.iter().for_each(|ino| drop(self.nodes.remove(ino)));
    }

    fn below(&self, ino: Ino, ancestor: Ino) -> bool {
        ino == ancestor
            || self.nodes[&ancestor].names.values().any(|child| self.nodes[child].directory && self.below(ino, *child))
    }

    fn rename(
        &mut self,
        (from, from_name): (Ino, &[u8]),
        (to, to_name): (Ino, &[u8]),
        mode: RenameMode,
    ) -> Result<(), Refusal> {
        let moved = self.named(from, from_name)?;
        let taken = self.named(to, to_name).ok();
        match (mode, taken) {
            (RenameMode::NoReplace, Some(_)) => return Err(Refusal::Exists),
            (RenameMode::Exchange, None) => return Err(Refusal::NotFound),
            (_, Some(taken)) if taken == moved => return Ok(()),
            _ => {}
        }
        if self.nodes[&moved].directory && self.below(to, moved) {
            return Err(Refusal::Invalid);
        }
        match taken {
            Some(taken) if mode == RenameMode::Exchange => {
                if self.nodes[&taken].directory && self.below(from, taken) {
                    return Err(Refusal::Invalid);
                }
                self.set(from, from_name, taken);
            }
            Some(taken) => {
                match (self.nodes[&moved].directory, self.nodes[&taken].directory) {
                    (true, false) => return Err(Refusal::NotDirectory),
                    (false, true) => return Err(Refusal::IsDirectory),
                    (true, true) if !self.nodes[&taken].names.is_empty() => return Err(Refusal::NotEmpty),
                    _ => {}
                }
                self.unset(from, from_name);
            }
            None => self.unset(from, from_name),
        }
        self.set(to, to_name, moved);
        Ok(())
    }

    fn set(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        self.nodes.get_mut(&dir).unwrap().names.insert(name.to_vec(), ino);
    }

    fn unset(&mut self, dir: Ino, name: &[u8]) {
        self.nodes.get_mut(&dir).unwrap().names.remove(name);
    }
}

struct Test {
    world: World,
    model: Model,
    sent: Vec<(Sequence, Op, Result<Mutated, Refusal>)>,
    /// Directories at each of their versions: names, and the parent.
    listed: BTreeMap<(Ino, u64), Listed>,
}

type Listed = (BTreeMap<Vec<u8>, Ino>, Option<Ino>);

impl Test {
    fn new() -> Self {
        let root = Node { directory: true, ..Node::default() };
        Self {
            world: World::new(),
            model: Model { nodes: BTreeMap::from([(Ino::ROOT, root)]) },
            sent: Vec::new(),
            listed: BTreeMap::new(),
        }
    }

    fn send(&mut self, op: Op) -> Result<Mutated, Refusal> {
        let answer = self.world.mutate(op.clone());
        self.sent.push((Sequence(self.world.sequence), op, answer.clone()));
        answer
    }

    fn step(&mut self, action: &Action) {
        let dirs = self.model.dirs();
        let dir = |n: usize| dirs[n % dirs.len()];
        let name = |n: u8| vec![b'a' + n];
        match *action {
            Action::Make { dir: parent, name: n, kind } => self.make(dir(parent), &name(n), kind),
            Action::Unlink { dir: parent, name: n } => self.unlink(dir(parent), &name(n)),
            Action::Rmdir { dir: parent, name: n } => self.rmdir(dir(parent), &name(n)),
            Action::Rename { from, from_name, to, to_name, mode } => {
                let (from, from_name, to, to_name) = (dir(from), name(from_name), dir(to), name(to_name));
                let answer =
                    self.send(Op::Rename { from, from_name: from_name.clone(), to, to_name: to_name.clone(), mode });
                let expected = self.model.rename((from, &from_name), (to, &to_name), mode);
                assert_eq!(answer.map(drop), expected, "{action:?}");
                self.model.forget_nameless();
            }
            Action::Retry { back } => self.retry(back),
            Action::Reclaim => {
                let inos = super::super::orphans::orphans_after(&self.world.view(), Ino(0), 100).unwrap();
                self.world.command(Command::Reclaim { inos }).unwrap();
            }
            Action::Replicas { node, count } => self.set_replicas(node, count),
            Action::ClusterReplicas { count } => {
                let replicas = Replicas::new(count).unwrap();
                self.world.command(Command::SetReplicas { replicas }).unwrap();
            }
            Action::Follow => {
                let inos = super::super::replicas::recounted_first(&self.world.view(), 2).unwrap();
                self.world.command(Command::Recount { inos }).unwrap();
                self.world.command(Command::Retarget).unwrap();
            }
            _ => self.step_on_files(action, &dirs),
        }
    }

    fn step_on_files(&mut self, action: &Action, dirs: &[Ino]) {
        let files = self.model.files();
        if files.is_empty() {
            return;
        }
        let pick = |n: usize| files[n % files.len()];
        match *action {
            Action::Link { file, dir, name } => {
                let (ino, parent, name) = (pick(file), dirs[dir % dirs.len()], vec![b'a' + name]);
                let answer = self.send(Op::Link { ino, parent, name: name.clone() });
                if self.model.named(parent, &name).is_ok() {
                    assert_eq!(answer, Err(Refusal::Exists));
                } else {
                    answer.unwrap();
                    self.model.set(parent, &name, ino);
                }
            }
            Action::Write { file, at, length, skip, seed } => self.write(pick(file), at, length, skip, seed),
            Action::Truncate { file, size } => {
                self.send(Op::SetAttr { ino: pick(file), set: SetAttr { size: Some(size), ..SetAttr::default() } })
                    .unwrap();
                let node = self.model.nodes.get_mut(&pick(file)).unwrap();
                node.size = size;
                node.bytes.retain(|at, _| *at < size);
            }
            Action::Punch { file, at, length, grow } => {
                self.send(Op::Punch { ino: pick(file), offset: at, length, grow }).unwrap();
                let node = self.model.nodes.get_mut(&pick(file)).unwrap();
                node.bytes.retain(|byte, _| !(at..at + length).contains(byte));
                node.size = if grow { node.size.max(at + length) } else { node.size };
            }
            Action::Copy { from, from_at, to, to_at, length } => {
                self.copy((pick(from), from_at), (pick(to), to_at), length)
            }
            _ => unreachable!("handled above"),
        }
    }

    fn set_replicas(&mut self, node: usize, count: usize) {
        let all: Vec<Ino> = [self.model.dirs(), self.model.files()].concat();
        let ino = all[node % all.len()];
        let name = REPLICAS_ATTRIBUTE.as_bytes().to_vec();
        let answer = match count {
            0 => self.send(Op::RemoveXattr { ino, name }),
            count => self.send(Op::SetXattr { ino, name, value: count.to_string().into_bytes(), mode: XattrMode::Set }),
        };
        let model = &mut self.model.nodes.get_mut(&ino).unwrap().replicas;
        let has_none = count == 0 && *model == Replicas::INHERITED;
        assert_eq!(answer, if has_none { Err(Refusal::NoAttribute) } else { Ok(Mutated::Done) });
        *model = Replicas::new(count).unwrap_or_default();
    }

    fn make(&mut self, parent: Ino, name: &[u8], kind: Kind) {
        let answer = self.send(make(parent, std::str::from_utf8(name).unwrap(), kind));
        if self.model.named(parent, name).is_ok() {
            assert_eq!(answer, Err(Refusal::Exists));
            return;
        }
        let Ok(Mutated::Inode { attr, created: true }) = answer else { panic!("{answer:?}") };
        let replicas = self.model.nodes[&parent].replicas;
        let node = Node { directory: kind == Kind::Directory, file: kind == Kind::File, replicas, ..Node::default() };
        self.model.nodes.insert(attr.ino, node);
        self.model.set(parent, name, attr.ino);
    }

    fn unlink(&mut self, parent: Ino, name: &[u8]) {
        let answer = self.send(Op::Unlink { parent, name: name.to_vec() }).map(drop);
        let expected = match self.model.named(parent, name) {
            Ok(ino) if self.model.nodes[&ino].directory => Err(Refusal::IsDirectory),
            other => other.map(drop),
        };
        assert_eq!(answer, expected);
        if answer.is_ok() {
            self.model.unset(parent, name);
            self.model.forget_nameless();
        }
    }

    fn rmdir(&mut self, parent: Ino, name: &[u8]) {
        let answer = self.send(Op::Rmdir { parent, name: name.to_vec() }).map(drop);
        let expected = match self.model.named(parent, name) {
            Ok(ino) if !self.model.nodes[&ino].directory => Err(Refusal::NotDirectory),
            Ok(ino) if !self.model.nodes[&ino].names.is_empty() => Err(Refusal::NotEmpty),
            other => other.map(drop),
        };
        assert_eq!(answer, expected);
        if answer.is_ok() {
            self.model.unset(parent, name);
            self.model.forget_nameless();
        }
    }

    /// A write that crosses an edge of a chunk is two pieces of one block.
    fn write(&mut self, ino: Ino, at: u64, length: u32, skip: u32, seed: u8) {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let here = at + u64::from(done);
            let index = u32::try_from(here / CHUNK_SIZE).unwrap();
            let offset = u32::try_from(here % CHUNK_SIZE).unwrap();
            let part = (length - done).min(u32::try_from(CHUNK_SIZE).unwrap() - offset);
            let piece = Piece { offset, length: part, block: super::hash(seed), block_offset: skip + done };
            pieces.push((index, piece));
            done += part;
        }
        let commit: FileCommit = file(ino, pieces, at);
        let new: NewBlock = block(seed, BLOCK_LENGTH, 2 + u32::from(seed % 2));
        self.send(Op::Commit { files: vec![commit], blocks: vec![new] }).unwrap();
        let node = self.model.nodes.get_mut(&ino).unwrap();
        for n in 0..length {
            node.bytes.insert(at + u64::from(n), byte_of(seed, skip + n));
        }
        node.size = node.size.max(at + u64::from(length));
    }

    fn copy(&mut self, (from, from_at): (Ino, u64), (to, to_at): (Ino, u64), length: u64) {
        let answer = self.send(Op::CopyRange { from, from_offset: from_at, to, to_offset: to_at, length });
        let source = self.model.nodes[&from].clone();
        let length = length.min(source.size.saturating_sub(from_at));
        if from == to && length > 0 && from_at < to_at + length && to_at < from_at + length {
            assert_eq!(answer, Err(Refusal::Invalid));
            return;
        }
        answer.unwrap();
        let node = self.model.nodes.get_mut(&to).unwrap();
        for n in 0..length {
            match source.bytes.get(&(from_at + n)) {
                Some(byte) => drop(node.bytes.insert(to_at + n, *byte)),
                None => drop(node.bytes.remove(&(to_at + n))),
            }
        }
        if length > 0 {
            node.size = node.size.max(to_at + length);
        }
    }

    fn retry(&mut self, back: u64) {
        let Some((sequence, op, answer)) = self.sent.iter().rev().nth(usize::try_from(back).unwrap()).cloned() else {
            return;
        };
        let before = self.world.dump();
        assert_eq!(self.world.mutate_as(sequence, op), answer);
        assert_eq!(self.world.dump(), before);
    }

    fn compare(&mut self) {
        self.world.check();
        for (ino, node) in &self.model.nodes {
            let attr = self.world.ask(|view| query::attr(view, *ino)).unwrap();
            assert_eq!(attr.replicas, node.replicas, "of {ino}");
            if node.directory {
                let subdirectories = node.names.values().filter(|child| self.model.nodes[child].directory).count();
                assert_eq!(attr.nlink as usize, 2 + subdirectories);
                let page = self.world.ask(|view| query::read_directory(view, *ino, 0, 1000, true, None)).unwrap();
                let query::Page { entries, parent, version, .. } = page.expect("it is asked for in any case");
                let listed: BTreeMap<_, _> = entries.into_iter().map(|entry| (entry.name, entry.ino)).collect();
                assert_eq!(listed, node.names);
                // Who has listed it at this version need not list it again.
                assert_eq!(attr.data_version, version);
                let before = self.listed.entry((*ino, version)).or_insert((listed.clone(), parent));
                assert_eq!(*before, (listed, parent));
            } else {
                assert_eq!(attr.nlink as usize, self.model.links(*ino));
            }
            if node.file {
                assert_eq!((attr.size, attr.stored), (node.size, node.bytes.len() as u64), "of {ino}");
                self.compare_bytes(*ino, node);
            }
        }
    }

    fn compare_bytes(&self, ino: Ino, node: &Node) {
        let map = self.world.ask(|view| query::file_map(view, ino, holdfast_common::ChunkIndex(0), 4)).unwrap();
        let mut bytes = BTreeMap::new();
        for (index, pieces) in map.chunks {
            for piece in pieces {
                for n in 0..piece.length {
                    let at = u64::from(index.0) * CHUNK_SIZE + u64::from(piece.offset + n);
                    bytes.insert(at, byte_of(piece.block.0[0], piece.block_offset + n));
                }
            }
        }
        assert_eq!(bytes, node.bytes, "bytes of {ino}");
        for offset in [0, 17, CHUNK_SIZE - 3, CHUNK_SIZE] {
            self.compare_seek(ino, node, offset);
        }
    }

    fn compare_seek(&self, ino: Ino, node: &Node, offset: u64) {
        let seek = |hole| match self.world.ask(|view| query::seek(view, ino, offset, hole)) {
            Ok(query::Sought::Found(found)) => Ok(found),
            Ok(query::Sought::Beyond(_)) => panic!("a short file is looked at whole"),
            Err(refusal) => Err(refusal),
        };
        if offset >= node.size {
            assert_eq!((seek(false), seek(true)), (Err(Refusal::NotFound), Err(Refusal::NotFound)));
            return;
        }
        let data = node.bytes.range(offset..).next().map(|(at, _)| *at).ok_or(Refusal::NotFound);
        let hole = (offset..).find(|at| !node.bytes.contains_key(at)).unwrap();
        assert_eq!((seek(false), seek(true)), (data, Ok(hole)), "from {offset} of {ino}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn random_operations_do_what_the_model_does(actions in proptest::collection::vec(action(), 1..60)) {
        let mut test = Test::new();
        for action in &actions {
            test.step(action);
            test.compare();
        }
    }
}
