//! What was written to one chunk and not yet made into blocks. Pure.

use std::{collections::BTreeMap, ops::Range};

use bytes::{Bytes, BytesMut};
use holdfast_common::limits::BLOCK_SIZE_MAX;

/// Runs of bytes by their offset in the chunk: never empty, never overlapping, never touching.
#[derive(Debug, Default)]
pub struct DirtyChunk {
    extents: BTreeMap<u32, BytesMut>,
}

/// A run of bytes taken out of a chunk, or on its way to the servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u32,
    pub bytes: Bytes,
}

impl Extent {
    pub fn range(&self) -> Range<u32> {
        self.offset..self.offset + length(&self.bytes)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "runs are cut at the chunk's end")]
pub(crate) fn length(bytes: &[u8]) -> u32 {
    debug_assert!(bytes.len() <= BLOCK_SIZE_MAX as usize);
    bytes.len() as u32
}

impl DirtyChunk {
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Whether one run covers the whole chunk.
    pub fn is_full(&self) -> bool {
        self.extents.first_key_value().is_some_and(|(_, bytes)| length(bytes) == BLOCK_SIZE_MAX)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.extents.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// First offset past the last written byte.
    pub fn end(&self) -> Option<u32> {
        self.extents.last_key_value().map(|(offset, bytes)| offset + length(bytes))
    }

    /// Writes `data` (not empty, within the chunk) at `offset`. Returns how many bytes more are held than before.
    /// A run that touches nothing keeps `data` without copying it, if nobody else holds it.
    pub fn write(&mut self, offset: u32, data: Bytes) -> u64 {
        let end = offset + length(&data);
        debug_assert!(offset < end && end <= BLOCK_SIZE_MAX);
        let before = self.bytes_touching(offset, end);
        match self.run_reaching(offset) {
            Some(start) => self.write_into(start, offset, &data),
            None => {
                let run = data.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
                let run = self.absorb(offset, run, end);
                self.extents.insert(offset, run);
            }
        }
        self.bytes_touching(offset, end) - before
    }

    /// The run that covers `offset` or ends there.
    fn run_reaching(&self, offset: u32) -> Option<u32> {
        let (start, bytes) = self.extents.range(..=offset).next_back()?;
        (start + length(bytes) >= offset).then_some(*start)
    }

    fn write_into(&mut self, start: u32, offset: u32, data: &[u8]) {
        let Some(mut run) = self.extents.remove(&start) else { return };
        let at = (offset - start) as usize;
        let overlap = data.len().min(run.len() - at);
        run[at..at + overlap].copy_from_slice(&data[..overlap]);
        run.extend_from_slice(&data[overlap..]);
        let end = start + length(&run);
        let run = self.absorb(start, run, end);
        self.extents.insert(start, run);
    }

    /// Takes in the runs that begin in `start..=end`: `run` wins where both have bytes.
    fn absorb(&mut self, start: u32, mut run: BytesMut, end: u32) -> BytesMut {
        while let Some((&next, _)) = self.extents.range(start..=end).next() {
            let Some(bytes) = self.extents.remove(&next) else { break };
            let covered = (end - next) as usize;
            if covered < bytes.len() {
                run.extend_from_slice(&bytes[covered..]);
                break;
            }
        }
        run
    }

    fn bytes_touching(&self, start: u32, end: u32) -> u64 {
        let first = self.run_reaching(start).unwrap_or(start);
        self.extents.range(first..=end).map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Forgets `range`. Returns how many bytes fewer are held.
    pub fn forget(&mut self, range: Range<u32>) -> u64 {
        let before = self.bytes();
        let first = self.run_reaching(range.start).unwrap_or(range.start);
        let touched: Vec<u32> = self.extents.range(first..range.end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(mut run) = self.extents.remove(&start) else { continue };
            let end = start + length(&run);
            if end > range.end {
                let tail = run.split_off(range.end.saturating_sub(start) as usize);
                self.extents.insert(range.end.max(start), tail);
            }
            run.truncate(range.start.saturating_sub(start) as usize);
            if !run.is_empty() {
                self.extents.insert(start, run);
            }
        }
        before - self.bytes()
    }

    /// Takes everything, in order.
    pub fn take(&mut self) -> Vec<Extent> {
        std::mem::take(&mut self.extents)
            .into_iter()
            .map(|(offset, bytes)| Extent { offset, bytes: bytes.freeze() })
            .collect()
    }

    /// Puts back what could not be written out: bytes written since then win. Returns how many bytes were given up for those.
    pub fn put_back(&mut self, extents: Vec<Extent>) -> u64 {
        let newer = self.take();
        let mut given = 0;
        for extent in extents {
            given += extent.bytes.len() as u64;
            self.write(extent.offset, extent.bytes);
        }
        let kept = self.bytes();
        let mut grown = 0;
        for extent in &newer {
            grown += self.write(extent.offset, extent.bytes.clone());
        }
        let newer_bytes: u64 = newer.iter().map(|extent| extent.bytes.len() as u64).sum();
        debug_assert_eq!(given, kept);
        newer_bytes - grown
    }

    /// Copies of the runs that touch `range`, cut to it.
    pub fn runs_in(&self, range: &Range<u32>) -> Vec<(u32, Bytes)> {
        let first = self.run_reaching(range.start).unwrap_or(range.start);
        let cut = |(start, bytes): (&u32, &BytesMut)| {
            let from = (*start).max(range.start);
            let to = (start + length(bytes)).min(range.end);
            let within = from.saturating_sub(*start) as usize..to.saturating_sub(*start) as usize;
            (from < to).then(|| (from, Bytes::copy_from_slice(&bytes[within])))
        };
        self.extents.range(first..range.end).filter_map(cut).collect()
    }

    /// The bytes of `range`, if one run has them all.
    pub fn covering(&self, range: &Range<u32>) -> Option<Bytes> {
        let start = self.run_reaching(range.start)?;
        let bytes = &self.extents[&start];
        bytes.get((range.start - start) as usize..(range.end - start) as usize).map(Bytes::copy_from_slice)
    }

    pub fn touches(&self, range: &Range<u32>) -> bool {
        let first = self.run_reaching(range.start).unwrap_or(range.start);
        self.extents.range(first..range.end).any(|(start, bytes)| start + length(bytes) > range.start)
    }
}

/// Copies what `bytes` at `start` and `range` have in common into `out`, whose first byte is that of `range`.
pub fn copy_overlap(start: u32, bytes: &[u8], range: &Range<u32>, out: &mut [u8]) {
    let from = start.max(range.start);
    let to = (start + length(bytes)).min(range.end);
    if from < to {
        let out = &mut out[(from - range.start) as usize..(to - range.start) as usize];
        out.copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPAN: u32 = 48;

    #[derive(Clone, Debug)]
    enum Step {
        Write(u32, u32),
        Forget(u32, u32),
        /// Take all, write something meanwhile, and put it back.
        Fail(u32, u32),
    }

    fn range() -> impl Strategy<Value = (u32, u32)> {
        (0..SPAN, 1..=SPAN).prop_map(|(a, b)| (a.min(b - 1), (a + 1).max(b).min(SPAN)))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => range().prop_map(|(a, b)| Step::Write(a, b)),
            1 => range().prop_map(|(a, b)| Step::Forget(a, b)),
            1 => range().prop_map(|(a, b)| Step::Fail(a, b)),
        ]
    }

    fn written(chunk: &DirtyChunk) -> Vec<Option<u8>> {
        let mut bytes = vec![None; SPAN as usize];
        for (start, run) in &chunk.extents {
            for (i, byte) in run.iter().enumerate() {
                bytes[*start as usize + i] = Some(*byte);
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn a_chunk_holds_the_last_bytes_written_to_each_place(steps in prop::collection::vec(step(), 1..40)) {
            let (mut chunk, mut model, mut held) = (DirtyChunk::default(), vec![None; SPAN as usize], 0u64);
            for (number, step) in (1u8..).zip(steps) {
                let data = |a: u32, b: u32| Bytes::from(vec![number; (b - a) as usize]);
                match step {
                    Step::Write(a, b) => {
                        model[a as usize..b as usize].fill(Some(number));
                        held += chunk.write(a, data(a, b));
                    }
                    Step::Forget(a, b) => {
                        model[a as usize..b as usize].fill(None);
                        held -= chunk.forget(a..b);
                    }
                    Step::Fail(a, b) => {
                        let taken = chunk.take();
                        model[a as usize..b as usize].fill(Some(number));
                        held += chunk.write(a, data(a, b));
                        held -= chunk.put_back(taken);
                    }
                }
                prop_assert_eq!(&written(&chunk), &model);
                prop_assert_eq!(chunk.bytes(), held);
                let runs: Vec<_> = chunk.extents.iter().map(|(start, run)| (*start, start + length(run))).collect();
                prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0), "runs touch: {:?}", runs);
                for a in 0..SPAN {
                    let mut out = vec![0; (SPAN - a) as usize];
                    for (start, run) in chunk.runs_in(&(a..SPAN)) {
                        copy_overlap(start, &run, &(a..SPAN), &mut out);
                    }
                    let expected: Vec<u8> = model[a as usize..].iter().map(|byte| byte.unwrap_or(0)).collect();
                    prop_assert_eq!(out, expected);
                    prop_assert_eq!(chunk.touches(&(a..a + 1)), model[a as usize].is_some());
                }
            }
        }
    }

    #[test]
    fn a_whole_chunk_is_kept_without_a_copy() {
        let data = Bytes::from(vec![7; BLOCK_SIZE_MAX as usize]);
        let address = data.as_ptr();
        let mut chunk = DirtyChunk::default();
        chunk.write(0, data);
        assert!(chunk.is_full());
        assert_eq!(chunk.take()[0].bytes.as_ptr(), address);
    }
}
