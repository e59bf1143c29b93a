//! Reads a segment record by record, and finds the next good one after damage.

use std::io;

use holdfast_common::disk::DiskFile;

use super::format::{ALIGNMENT, Key, Place, RECORD_HEADER_LENGTH, RECORD_MAGIC, RecordHeader};

const WINDOW: usize = 64 << 10;
const PAGE: usize = 4096;

/// What a scan meets, in order of offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A header that parses, with room for its payload. The payload was not looked at.
    Record { place: Place, header: RecordHeader },
    /// Bytes in which no record starts, up to the next one or to the `end` of the file.
    Bad { place: Place, end: u64, at_end_of_file: bool },
    /// Zeroes up to the end of the file, which were written ahead of records that did not come.
    Blank { place: Place },
}

/// The records of segment `number` from offset `from` (a multiple of 8) on.
pub(super) struct Scan<'a> {
    file: &'a dyn DiskFile,
    key: &'a Key,
    next: Place,
    length: u64,
    window: Vec<u8>,
    window_start: u64,
}

impl<'a> Scan<'a> {
    pub(super) fn new(file: &'a dyn DiskFile, key: &'a Key, from: Place) -> io::Result<Self> {
        Ok(Self { file, key, next: from, length: file.length()?, window: Vec::new(), window_start: 0 })
    }

    /// The record at `offset`, if one starts there and ends within the file.
    fn record_at(&mut self, offset: u64) -> Option<RecordHeader> {
        let place = Place { segment: self.next.segment, offset };
        let (key, length) = (self.key, self.length);
        let bytes = self.bytes_at(offset)?;
        if bytes[..RECORD_MAGIC.len()] != RECORD_MAGIC {
            return None;
        }
        RecordHeader::decode(bytes, key, place).ok().filter(|header| offset + header.end() <= length)
    }

    fn bytes_at(&mut self, offset: u64) -> Option<&[u8; RECORD_HEADER_LENGTH]> {
        if offset + RECORD_HEADER_LENGTH as u64 > self.length {
            return None;
        }
        let window_end = self.window_start + self.window.len() as u64;
        if offset < self.window_start || offset + RECORD_HEADER_LENGTH as u64 > window_end {
            self.fill(offset);
        }
        let start = usize::try_from(offset - self.window_start).ok()?;
        self.window.get(start..start + RECORD_HEADER_LENGTH)?.try_into().ok()
    }

    /// Could all of it be read?
    fn fill(&mut self, offset: u64) -> bool {
        let room = usize::try_from(self.length - offset).unwrap_or(WINDOW);
        self.window.resize(room.min(WINDOW), 0);
        self.window_start = offset;
        let is_read = self.file.read_exact_at(&mut self.window, offset).is_ok();
        if !is_read {
            self.fill_page_by_page();
        }
        is_read
    }

    /// Pages that cannot be read become zeroes, which are no record.
    fn fill_page_by_page(&mut self) {
        let mut offset = self.window_start;
        for page in self.window.chunks_mut(PAGE) {
            if let Err(error) = self.file.read_exact_at(page, offset) {
                tracing::error!(segment = self.next.segment, offset, %error, "cannot read a page of a segment");
                page.fill(0);
            }
            offset += PAGE as u64;
        }
    }

    fn bad_from(&mut self, start: u64) -> Item {
        let mut offset = start + ALIGNMENT;
        while offset + RECORD_HEADER_LENGTH as u64 <= self.length {
            if self.record_at(offset).is_some() {
                return self.bad(start, offset, false);
            }
            offset += ALIGNMENT;
        }
        self.bad(start, self.length, true)
    }

    fn is_blank_from(&mut self, start: u64) -> bool {
        let mut offset = start;
        while offset < self.length {
            // What cannot be read is not known to be blank.
            if !self.fill(offset) || self.window.iter().any(|byte| *byte != 0) {
                return false;
            }
            offset += self.window.len() as u64;
        }
        true
    }

    fn bad(&mut self, start: u64, end: u64, at_end_of_file: bool) -> Item {
        let place = Place { offset: start, ..self.next };
        self.next.offset = end;
        Item::Bad { place, end, at_end_of_file }
    }
}

impl Iterator for Scan<'_> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        let place = self.next;
        if place.offset >= self.length {
            return None;
        }
        match self.record_at(place.offset) {
            Some(header) => {
                self.next.offset += header.span();
                Some(Item::Record { place, header })
            }
            None if self.is_blank_from(place.offset) => {
                self.next.offset = self.length;
                Some(Item::Blank { place })
            }
            None => Some(self.bad_from(place.offset)),
        }
    }
}
