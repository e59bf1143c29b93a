//! Gives back the space of small dead records, which no hole in a file can: what still lives in a segment that is mostly dead is
//! appended again, and the segment removed.
//!
//! A segment is rewritten only if its living part is at most half of what it takes on the disk. So at most one byte is written for
//! each that is given back, and of all segments but the newest at most half is dead, or `waste_bytes` of each.

use std::collections::{BTreeSet, VecDeque};

use holdfast_common::BlockHash;

use super::{
    CheckedBlock, Inner, NewBlock, RECORD_HEADER_LENGTH, StoreError,
    format::{Kind, Place, RecordHeader, SEGMENT_HEADER_LENGTH},
    index::{Entry, Usage},
    scan::{Item, Scan},
    segment::list_segments,
};

/// Bytes that are read and appended at a time.
const BATCH_BYTES: u64 = 4 << 20;
/// Bytes by which the last batch may make a segment longer than it should be.
const PAST_THE_END: u64 = 16 << 20;
/// Bytes of the filesystem that have to stay free while segments are rewritten: less, and space is made by deleting alone.
const FREE_MIN: u64 = 64 << 20;

/// What is still to be rewritten.
#[derive(Debug, Default)]
pub(super) struct Compaction {
    segments: VecDeque<u64>,
    /// Where the first of them is read on.
    offset: u64,
    /// Segments in which something could not be moved: not tried again before the next start.
    stuck: BTreeSet<u64>,
}

impl Compaction {
    pub(super) fn is_done(&self) -> bool {
        self.segments.is_empty()
    }

    fn next_segment(&mut self) {
        self.segments.pop_front();
        self.offset = SEGMENT_HEADER_LENGTH;
    }
}

/// A living record that was read and checked.
struct Living {
    block: CheckedBlock,
    entry: Entry,
}

impl Inner {
    /// Looks for segments that are worth it.
    pub(super) fn plan_compaction(&self, compaction: &mut Compaction) -> Result<(), StoreError> {
        let newest = self.tail.lock().end().segment;
        let numbers = list_segments(self.segments.disk.as_ref(), &self.segments.directory)?;
        compaction.segments.clear();
        compaction.offset = SEGMENT_HEADER_LENGTH;
        for number in numbers.into_iter().filter(|number| *number < newest && !compaction.stuck.contains(number)) {
            let living = self.index.usage_of(number);
            // Most are full of what lives, and need not be opened to see that.
            let longest = self.options.segment_bytes.saturating_add(PAST_THE_END);
            let may_be = is_wasteful(living, longest, self.options.waste_bytes);
            if may_be && is_wasteful(living, self.segments.file(number)?.allocated()?, self.options.waste_bytes) {
                compaction.segments.push_back(number);
            }
        }
        Ok(())
    }

    /// Rewrites about `budget` bytes of what was planned.
    pub(super) fn compact(&self, compaction: &mut Compaction, budget: u64) -> Result<(), StoreError> {
        let mut moved = 0;
        while moved < budget
            && let Some(number) = compaction.segments.front().copied()
        {
            if self.segments.disk.space(&self.directory)?.free + self.ballast.held() < FREE_MIN {
                tracing::warn!("there is too little room to rewrite segments");
                compaction.segments.clear();
                return Ok(());
            }
            // Nothing lives in it any more: it goes, or is gone already, without being rewritten.
            if self.index.usage_of(number).blocks == 0 {
                compaction.next_segment();
                continue;
            }
            let from = Place { segment: number, offset: compaction.offset };
            let Step { next, bytes, stuck } = match self.compact_from(from) {
                Err(StoreError::Full) => {
                    tracing::warn!("there is no room to rewrite segments");
                    compaction.segments.clear();
                    return Ok(());
                }
                step => step.inspect_err(|_| {
                    compaction.stuck.insert(number);
                    compaction.next_segment();
                })?,
            };
            moved += bytes;
            if stuck {
                compaction.stuck.insert(number);
            }
            match next {
                Some(offset) => compaction.offset = offset,
                None => {
                    // A record that the scan could not read, say: it would be found wasteful again at once.
                    if self.index.usage_of(number).blocks > 0 {
                        compaction.stuck.insert(number);
                    }
                    tracing::info!(segment = number, "rewrote what lived in a segment that was mostly dead");
                    compaction.next_segment();
                }
            }
        }
        Ok(())
    }

    /// One batch.
    fn compact_from(&self, from: Place) -> Result<Step, StoreError> {
        let file = self.segments.file(from.segment)?;
        let mut step = Step { next: None, bytes: 0, stuck: false };
        let mut living = Vec::new();
        for item in Scan::new(file.as_ref(), &self.segments.key, from)? {
            let Item::Record { place, header } = item else { continue };
            if step.bytes >= BATCH_BYTES {
                step.next = Some(place.offset);
                break;
            }
            let Some(entry) = self.living(place, &header)? else { continue };
            match self.read_block(&header.hash, &entry) {
                Ok(block) => {
                    step.bytes += u64::from(entry.length);
                    living.push(Living { block, entry });
                }
                // Deleted or moved meanwhile.
                Err(StoreError::Missing) => {}
                Err(error) => {
                    tracing::error!(block = %header.hash, %error, "a block cannot be moved out of a segment that is mostly dead");
                    step.stuck = true;
                }
            }
        }
        self.append_again(&living)?;
        Ok(step)
    }

    /// Where the index points, if it points to this record.
    fn living(&self, place: Place, header: &RecordHeader) -> Result<Option<Entry>, StoreError> {
        if header.kind != Kind::Block {
            return Ok(None);
        }
        let entry = self.index.get(&header.hash).map_err(|error| self.index_failed(&error))?;
        Ok(entry.filter(|entry| entry.place == place))
    }

    fn read_block(&self, hash: &BlockHash, entry: &Entry) -> Result<CheckedBlock, StoreError> {
        let read = || {
            let (bytes, skip) = self.read_whole(hash, entry, self.once(entry))?;
            CheckedBlock::verify(*hash, bytes.slice(skip..), entry.epoch)
                .map_err(|error| StoreError::Damaged(error.to_string()))
        };
        read().or_else(|error| {
            let now = self.index.get(hash).map_err(|error| self.index_failed(&error))?;
            if now == Some(*entry) { Err(error) } else { Err(StoreError::Missing) }
        })
    }

    /// Appends those whose place has not changed meanwhile. The room was there before, and there will be more after it.
    fn append_again(&self, living: &[Living]) -> Result<(), StoreError> {
        self.check_running()?;
        let mut tail = self.tail.lock();
        let mut again = Vec::with_capacity(living.len());
        for Living { block, entry } in living {
            if self.index.get(&block.hash()).map_err(|error| self.index_failed(&error))? == Some(*entry) {
                again.push(NewBlock { block, epoch: entry.epoch, before: Some(*entry) });
            }
        }
        if again.is_empty() { Ok(()) } else { self.append_records(&mut tail, &again, true) }
    }
}

struct Step {
    /// Where to go on; `None`: the segment is done.
    next: Option<u64>,
    /// Of blocks that were moved.
    bytes: u64,
    /// Something could not be.
    stuck: bool,
}

/// `taken`: bytes of the segment on the disk.
fn is_wasteful(living: Usage, taken: u64, waste_min: u64) -> bool {
    let trees = living.bytes / 256;
    let needed = living.bytes + trees + living.blocks * (RECORD_HEADER_LENGTH as u64 + 8);
    living.blocks > 0 && taken >= needed.saturating_mul(2) && taken - needed >= waste_min
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_rewritten_when_half_of_it_is_dead_and_that_is_a_mebibyte() {
        let mib = 1 << 20;
        let living = |blocks, bytes| Usage { blocks, bytes };
        assert!(is_wasteful(living(1000, 4_096_000), 10 * mib, mib));
        assert!(!is_wasteful(living(1000, 4_096_000), 8_000_000, mib));
        assert!(!is_wasteful(living(1, 4096), mib, mib), "too little");
        assert!(!is_wasteful(living(0, 0), 256 * mib, mib), "it goes without being rewritten");
    }
}
