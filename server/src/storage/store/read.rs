//! Reading: what a request wants of a block, where that is on the disk, and what may be sent of what is found there.

use std::{collections::BTreeMap, io, ops::Range, sync::Arc, sync::atomic::Ordering::Relaxed};

use bao_tree::{
    ChunkNum, ChunkRanges,
    io::{outboard::PreOrderMemOutboard, round_up_to_chunks_groups, sync::encode_ranges},
};
use bytes::Bytes;
use holdfast_common::{BlockHash, disk::Extent, limits::HASH_GROUP_SIZE, wire::storage::ByteRange};

use super::{
    CheckedBlock, Inner, LONG, SUSPECTS_MAX, Store, StoreError,
    format::{self, Key, Kind, RECORD_HEADER_LENGTH, RecordHeader, tree_length},
    index::{Entry, IndexError},
};

/// What is wanted of a block, and where it is now.
#[derive(Clone, Debug)]
pub struct Plan {
    hash: BlockHash,
    entry: Entry,
    /// Bytes of the block, of whole groups, that are wanted with their proof; `None`: all of it, without.
    groups: Option<Range<u32>>,
}

impl Plan {
    fn new(hash: BlockHash, entry: Entry, range: Option<ByteRange>) -> Result<Self, StoreError> {
        let groups_of = |range: ByteRange| -> Result<Range<u32>, StoreError> {
            let end = range.offset.checked_add(range.length).filter(|end| range.length > 0 && *end <= entry.length);
            let end = end.ok_or(StoreError::Range)?.next_multiple_of(HASH_GROUP_SIZE).min(entry.length);
            Ok(range.offset / HASH_GROUP_SIZE * HASH_GROUP_SIZE..end)
        };
        Ok(Self { hash, entry, groups: range.map(groups_of).transpose()? })
    }

    /// Bytes of the block that are read for it.
    pub fn length(&self) -> u32 {
        self.groups.as_ref().map_or(self.entry.length, |groups| groups.end - groups.start)
    }

    /// Bytes of the whole block.
    pub fn block_length(&self) -> u32 {
        self.entry.length
    }

    /// Bytes of the record before the block's own.
    fn skip(&self) -> usize {
        RECORD_HEADER_LENGTH + tree_length(self.entry.length) as usize
    }

    /// The start of the record, with all of the block if all is wanted.
    fn head(&self) -> Extent {
        let payload = if self.groups.is_none() { self.entry.length as usize } else { 0 };
        Extent { offset: self.entry.place.offset, length: self.skip() + payload }
    }

    fn body(&self) -> Option<Extent> {
        let offset = self.entry.place.offset + self.skip() as u64;
        self.groups.as_ref().map(|groups| Extent {
            offset: offset + u64::from(groups.start),
            length: (groups.end - groups.start) as usize,
        })
    }

    /// What is sent, of what the extents had: `head` and `body`.
    fn answer(&self, key: &Key, head: &Bytes, body: &[u8]) -> Result<Bytes, StoreError> {
        check_header(&self.hash, &self.entry, key, head)?;
        let Some(groups) = &self.groups else { return Ok(head.slice(self.skip()..)) };
        let found = Groups { start: u64::from(groups.start), bytes: body };
        encode(&self.hash, self.entry.length, &head[RECORD_HEADER_LENGTH..self.skip()], &found)
    }
}

impl Store {
    /// The block's bytes. Their hash is *not* checked here: who reads checks, and has `verify` called when it is wrong.
    pub fn get(&self, hash: &BlockHash) -> Result<Bytes, StoreError> {
        self.inner.located(hash, |entry| {
            let again = entry.length >= LONG && self.inner.lately.lock().note(*hash);
            self.inner.read_payload(hash, entry, if again { Patience::Wait } else { self.inner.once(entry) })
        })
    }

    /// The bao encoding (groups of `HASH_GROUP_SIZE`, no length prefix) of the groups that `range` touches, and the
    /// block's length.
    pub fn get_range(&self, hash: &BlockHash, range: ByteRange) -> Result<(Bytes, u32), StoreError> {
        self.inner.located(hash, |entry| {
            let plan = Plan::new(*hash, *entry, Some(range))?;
            Ok((self.inner.carry_out(&plan, Patience::Wait)?, plan.block_length()))
        })
    }

    /// Where the block is, and what to read there: all of it, or the groups that `range` touches. It may move at any time.
    pub fn plan(&self, hash: &BlockHash, range: Option<ByteRange>) -> Result<Plan, StoreError> {
        let entry = self.inner.index.get(hash).map_err(|error| self.inner.index_failed(&error))?;
        Plan::new(*hash, entry.ok_or(StoreError::Missing)?, range)
    }

    /// Reads as planned without a thread that waits, see [`holdfast_common::disk::DiskFile::read_soon`]. `None` if that cannot be done, or if
    /// what is found is not what should be there: `get` and `get_range` tell why.
    pub fn read_soon(&self, plan: &Plan) -> Option<impl Future<Output = Option<Bytes>> + Send + use<>> {
        let file = self.inner.segments.file(plan.entry.place.segment).ok()?;
        let extents = [Some(plan.head()), plan.body()];
        let reading = file.read_soon(&extents.into_iter().flatten().collect::<Vec<_>>())?;
        let (inner, plan) = (Arc::clone(&self.inner), plan.clone());
        Some(async move {
            let found = reading.await.ok()?.ok()?;
            plan.answer(&inner.segments.key, found.first()?, found.get(1).map_or(&[], |body| body)).ok()
        })
    }

    /// Reads as planned from memory; `None` if not all of it is there, or not what should be.
    pub fn read_cached(&self, plan: &Plan) -> Option<Bytes> {
        self.inner.carry_out(plan, Patience::CachedOnly).ok()
    }

    /// Which of `hashes` are indexed, in segments that are long enough.
    pub fn has(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, StoreError> {
        self.inner.has(hashes)
    }
}

/// Whether a read may ask the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Wait,
    /// It may, and memory need not keep what it brings.
    Once,
    CachedOnly,
}

/// What says that the copy is bad; anything else (no descriptors, no memory) says nothing about the copy.
fn read_error(error: io::Error) -> StoreError {
    let is_damage = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof)
        || matches!(error.raw_os_error(), Some(libc::EIO | libc::EUCLEAN | libc::EBADMSG));
    match error.kind() {
        io::ErrorKind::WouldBlock => StoreError::NotCached,
        _ if is_damage => StoreError::Damaged(format!("it cannot be read: {error}")),
        _ => StoreError::Io(error),
    }
}

impl Inner {
    /// Runs `read` on the block's entry. If it finds damage while the block moved away under it, it looks again.
    pub(super) fn located<T>(
        &self,
        hash: &BlockHash,
        read: impl Fn(&Entry) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let look = || self.index.get(hash).map_err(|error| self.index_failed(&error))?.ok_or(StoreError::Missing);
        let mut entry = look()?;
        loop {
            let damage = match read(&entry) {
                Err(damage @ StoreError::Damaged(_)) => damage,
                other => return other,
            };
            let now = look()?;
            if now == entry {
                self.suspect(*hash, &damage);
                return Err(damage);
            }
            entry = now;
        }
    }

    pub(super) fn suspect(&self, hash: BlockHash, damage: &StoreError) {
        tracing::error!(block = %hash, %damage, "a copy is damaged");
        let mut suspects = self.suspects.lock();
        if suspects.len() >= SUSPECTS_MAX {
            suspects.pop_first();
        }
        suspects.insert(hash);
    }

    fn carry_out(&self, plan: &Plan, patience: Patience) -> Result<Bytes, StoreError> {
        let (head, body) = (plan.head(), plan.body());
        let segment = plan.entry.place.segment;
        if let Some(body) = body.filter(|_| patience == Patience::Wait) {
            // The tree and the bytes come from the disk at the same time.
            self.segments.file(segment).map_err(read_error)?.start_read(body.offset, body.length as u64);
        }
        let head = self.read(segment, head, patience)?;
        let body = body.map(|body| self.read(segment, body, patience)).transpose()?;
        plan.answer(&self.segments.key, &head, body.as_deref().unwrap_or_default())
    }

    /// How to read a block that will hardly be read again soon. Not past the kernel's memory in the growing segment: such a read
    /// holds up writes of the same file.
    pub(super) fn once(&self, entry: &Entry) -> Patience {
        let is_growing = entry.place.segment == self.growing.load(Relaxed);
        if entry.length >= LONG && !is_growing { Patience::Once } else { Patience::Wait }
    }

    fn read(&self, segment: u64, extent: Extent, patience: Patience) -> Result<Bytes, StoreError> {
        let Extent { offset, length } = extent;
        let read = self.segments.file(segment).and_then(|file| {
            if patience == Patience::Once {
                return file.read_once(offset, length);
            }
            let mut bytes = vec![0; length];
            match patience {
                Patience::CachedOnly => file.read_cached_at(&mut bytes, offset)?,
                Patience::Wait | Patience::Once => file.read_exact_at(&mut bytes, offset)?,
            }
            Ok(bytes.into())
        });
        read.map_err(read_error)
    }

    pub(super) fn read_payload(
        &self,
        hash: &BlockHash,
        entry: &Entry,
        patience: Patience,
    ) -> Result<Bytes, StoreError> {
        self.carry_out(&Plan::new(*hash, *entry, None)?, patience)
    }

    /// All of a record, whose header is checked, and where in it the block starts.
    pub(super) fn read_whole(
        &self,
        hash: &BlockHash,
        entry: &Entry,
        patience: Patience,
    ) -> Result<(Bytes, usize), StoreError> {
        let plan = Plan::new(*hash, *entry, None)?;
        let bytes = self.read(entry.place.segment, plan.head(), patience)?;
        check_header(hash, entry, &self.segments.key, &bytes)?;
        Ok((bytes, plan.skip()))
    }

    /// A block: its bytes are good, and the tree beside them is not.
    pub(super) fn check_record(&self, hash: &BlockHash, entry: &Entry) -> Result<Option<CheckedBlock>, StoreError> {
        let (bytes, skip) = self.read_whole(hash, entry, self.once(entry))?;
        let block = CheckedBlock::verify(*hash, bytes.slice(skip..), entry.epoch)
            .map_err(|error| StoreError::Damaged(error.to_string()))?;
        Ok((block.tree() != &bytes[RECORD_HEADER_LENGTH..skip]).then_some(block))
    }

    pub(super) fn has(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, StoreError> {
        let mut lengths: BTreeMap<u64, u64> = BTreeMap::new();
        let mut length_of = |number: u64| {
            *lengths
                .entry(number)
                .or_insert_with(|| self.segments.file(number).and_then(|file| file.length()).unwrap_or(0))
        };
        let mut is_here = |hash: &BlockHash| -> Result<bool, IndexError> {
            let entry = self.index.get(hash)?;
            Ok(entry.is_some_and(|entry| entry.place.offset + entry.record_length() <= length_of(entry.place.segment)))
        };
        hashes.iter().map(|hash| is_here(hash).map_err(|error| self.index_failed(&error))).collect()
    }
}

/// Is it the record of that block?
fn check_header(hash: &BlockHash, entry: &Entry, key: &Key, record: &[u8]) -> Result<(), StoreError> {
    match record.first_chunk().map(|header| RecordHeader::decode(header, key, entry.place)) {
        Some(Ok(RecordHeader { kind: Kind::Block, hash: found, length, .. }))
            if found == *hash && length == entry.length =>
        {
            Ok(())
        }
        Some(Err(fault)) => Err(StoreError::Damaged(format!("its header does not parse: {fault}"))),
        Some(Ok(_)) | None => Err(StoreError::Damaged("another record is in its place".to_owned())),
    }
}

/// The groups of a block that were read, seen as the whole block.
struct Groups<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl bao_tree::io::sync::ReadAt for &Groups<'_> {
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = position.checked_sub(self.start).and_then(|start| usize::try_from(start).ok());
        let bytes = start.and_then(|start| self.bytes.get(start..)).unwrap_or(&[]);
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        Ok(length)
    }
}

impl bao_tree::io::sync::Size for &Groups<'_> {
    fn size(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

/// The bao encoding of whole groups, with the proof from a stored tree.
fn encode(hash: &BlockHash, length: u32, tree: &[u8], groups: &Groups<'_>) -> Result<Bytes, StoreError> {
    let outboard =
        PreOrderMemOutboard { root: blake3::Hash::from_bytes(hash.0), tree: format::bao_tree(length), data: tree };
    let end = groups.start + groups.bytes.len() as u64;
    let chunks = ChunkRanges::from(ChunkNum::full_chunks(groups.start)..ChunkNum::chunks(end));
    let chunks = round_up_to_chunks_groups(chunks, format::GROUP);
    let mut encoding = Vec::with_capacity(groups.bytes.len() + tree.len());
    encode_ranges(groups, &outboard, &chunks, &mut encoding)
        .map_err(|error| StoreError::Damaged(format!("it cannot be encoded: {error}")))?;
    Ok(encoding.into())
}
