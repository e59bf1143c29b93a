//! The bytes of segment files: headers, records, and where the next one starts. Pure.
//!
//! A segment is a 64-byte header and then records, each starting at a multiple of 8:
//!
//! ```text
//! segment  magic "HOLDFSEG" | version u32 | 0 u32 | number u64 | key [32] | checksum u64
//! record   magic "HFrc" | version u8 | kind u8 | flags u16 | length u32 | 0 u32 | sequence u64 | value u64
//!          | hash [32] | checksum u64 | tree | payload | zeroes to a multiple of 8
//! ```
//!
//! All numbers are little-endian. A record's checksum is BLAKE3 keyed with the store's secret key over its header,
//! its segment's number and its offset: neither stale bytes, nor a block that somebody stored because it looks
//! like a record, ever parses. The tree stands before the payload, so that one read brings header and tree, and a
//! large payload is written from where it lies. Eight bytes, and not 4096, of alignment: a 4 KiB block would take
//! twice its space, and the page cache does not care.

use bao_tree::{BaoTree, BlockSize};
use holdfast_common::{
    BlockHash,
    limits::{BLOCK_SIZE_MAX, HASH_GROUP_SIZE},
};

pub(super) const VERSION: u32 = 1;
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
pub(super) const SEGMENT_HEADER_LENGTH: u64 = SEGMENT_HEADER_BYTES as u64;
pub(super) const RECORD_HEADER_LENGTH: usize = 72;
pub(super) const ALIGNMENT_BYTES: usize = 8;
pub(super) const ALIGNMENT: u64 = ALIGNMENT_BYTES as u64;

const SEGMENT_MAGIC: [u8; 8] = *b"HOLDFSEG";
pub(super) const RECORD_MAGIC: [u8; 4] = *b"HFrc";

/// The grain of the stored trees: 16 chunks of 1 KiB.
pub(super) const GROUP: BlockSize = BlockSize::from_chunk_log(4);
const _: () = assert!(GROUP.bytes() == HASH_GROUP_SIZE as usize);

/// Secret of a store, repeated in each of its segments.
pub(super) type Key = [u8; 32];

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `hash` is here; `value` is its epoch.
    Block,
    /// `hash` is here no more; `value` is the epoch it was condemned at.
    Delete,
    /// Every record with a sequence up to `value` is on stable storage.
    Mark,
    /// `length` bytes without meaning: what was deleted, or never reached the disk.
    Void,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Block => 1,
            Self::Delete => 2,
            Self::Mark => 3,
            Self::Void => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Block, Self::Delete, Self::Mark, Self::Void].into_iter().find(|kind| kind.code() == code)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub(super) kind: Kind,
    /// Bytes of payload: 1..=`BLOCK_SIZE_MAX` for a block, any for a void, else 0.
    pub(super) length: u32,
    /// Counted over the whole store; a later record has a larger one.
    pub(super) sequence: u64,
    pub(super) value: u64,
    pub(super) hash: BlockHash,
}

/// Where a record is. Part of its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) offset: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatFault {
    #[error("the magic is wrong")]
    Magic,
    #[error("the checksum is wrong")]
    Checksum,
    #[error("version {0} is not known")]
    Version(u32),
    #[error("it says segment {0}")]
    Number(u64),
    #[error("kind {0} with length {1} makes no sense")]
    Meaning(u8, u32),
    #[error("it is cut short")]
    Short,
}

/// Bytes of the hash tree that is stored with a block of `length` bytes: 64 for each group but one.
pub(super) fn tree_length(length: u32) -> u32 {
    length.div_ceil(HASH_GROUP_SIZE).saturating_sub(1) * 64
}

pub(super) fn bao_tree(length: u32) -> BaoTree {
    BaoTree::new(u64::from(length), GROUP)
}

impl RecordHeader {
    fn tree_length(&self) -> u32 {
        match self.kind {
            Kind::Block => tree_length(self.length),
            Kind::Delete | Kind::Mark | Kind::Void => 0,
        }
    }

    /// Bytes from this record's start to the next one's.
    pub(super) fn span(&self) -> u64 {
        (RECORD_HEADER_LENGTH as u64 + u64::from(self.tree_length()) + u64::from(self.length))
            .next_multiple_of(ALIGNMENT)
    }

    /// Bytes from this record's start that mean something: `span` without its padding.
    pub(super) fn end(&self) -> u64 {
        RECORD_HEADER_LENGTH as u64 + u64::from(self.tree_length()) + u64::from(self.length)
    }

    pub(super) fn encode(&self, key: &Key, place: Place) -> [u8; RECORD_HEADER_LENGTH] {
        let mut bytes = [0; RECORD_HEADER_LENGTH];
        bytes[..4].copy_from_slice(&RECORD_MAGIC);
        bytes[4] = 1;
        bytes[5] = self.kind.code();
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.value.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.hash.0);
        let checksum = record_checksum(&bytes, key, place);
        bytes[64..].copy_from_slice(&checksum);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; RECORD_HEADER_LENGTH], key: &Key, place: Place) -> Result<Self, FormatFault> {
        if bytes[..4] != RECORD_MAGIC {
            return Err(FormatFault::Magic);
        }
        if bytes[64..] != record_checksum(bytes, key, place) {
            return Err(FormatFault::Checksum);
        }
        if bytes[4] != 1 || bytes[6..8] != [0; 2] {
            return Err(FormatFault::Version(u32::from(bytes[4])));
        }
        let length = u32_at(bytes, 8);
        let meaning = FormatFault::Meaning(bytes[5], length);
        let kind = Kind::from_code(bytes[5]).ok_or(meaning)?;
        let hash = BlockHash(array_at(bytes, 32));
        let header = Self { kind, length, sequence: u64_at(bytes, 16), value: u64_at(bytes, 24), hash };
        if header.makes_sense() { Ok(header) } else { Err(meaning) }
    }

    fn makes_sense(&self) -> bool {
        match self.kind {
            Kind::Block => (1..=BLOCK_SIZE_MAX).contains(&self.length),
            Kind::Delete | Kind::Mark => self.length == 0,
            Kind::Void => true,
        }
    }
}

fn record_checksum(bytes: &[u8; RECORD_HEADER_LENGTH], key: &Key, place: Place) -> [u8; 8] {
    let mut input = [0; 80];
    input[..64].copy_from_slice(&bytes[..64]);
    input[64..72].copy_from_slice(&place.segment.to_le_bytes());
    input[72..].copy_from_slice(&place.offset.to_le_bytes());
    array_at(blake3::keyed_hash(key, &input).as_bytes(), 0)
}

pub(super) fn encode_segment_header(number: u64, key: &Key) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&number.to_le_bytes());
    bytes[24..56].copy_from_slice(key);
    let checksum: [u8; 8] = array_at(blake3::hash(&bytes[..56]).as_bytes(), 0);
    bytes[56..].copy_from_slice(&checksum);
    bytes
}

/// The key in the header of segment `number`.
pub(super) fn decode_segment_header(bytes: &[u8; SEGMENT_HEADER_BYTES], number: u64) -> Result<Key, FormatFault> {
    if bytes[..8] != SEGMENT_MAGIC {
        return Err(FormatFault::Magic);
    }
    if bytes[56..] != blake3::hash(&bytes[..56]).as_bytes()[..8] {
        return Err(FormatFault::Checksum);
    }
    match (u32_at(bytes, 8), u64_at(bytes, 16)) {
        (VERSION, found) if found == number => Ok(array_at(bytes, 24)),
        (VERSION, found) => Err(FormatFault::Number(found)),
        (version, _) => Err(FormatFault::Version(version)),
    }
}

/// `offset..offset + N` of `bytes`; the callers' offsets are constants within their arrays.
pub(super) fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[offset..offset + N]);
    array
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: Key = [7; 32];
    const PLACE: Place = Place { segment: 3, offset: 64 };

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn header(kind: Kind, length: u32) -> RecordHeader {
        RecordHeader { kind, length, sequence: 5, value: 9, hash: BlockHash([0xcd; 32]) }
    }

    #[test]
    fn the_bytes_are_frozen() {
        assert_eq!(
            hex(&encode_segment_header(3, &KEY)),
            "484f4c4446534547010000000000000003000000000000000707070707070707070707070707070707070707070707070707070707070707ccd76f8ee6e85fb0"
        );
        for (kind, length, golden) in [
            (
                Kind::Block,
                4096,
                "4846726301010000001000000000000005000000000000000900000000000000cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd8bfc5b6aa3d64538",
            ),
            (
                Kind::Delete,
                0,
                "4846726301020000000000000000000005000000000000000900000000000000cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdc64c10e2f6ee824b",
            ),
            (
                Kind::Mark,
                0,
                "4846726301030000000000000000000005000000000000000900000000000000cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdfc2b16d022c652ef",
            ),
            (
                Kind::Void,
                24,
                "4846726301040000180000000000000005000000000000000900000000000000cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd5f61704e70839859",
            ),
        ] {
            assert_eq!(hex(&header(kind, length).encode(&KEY, PLACE)), golden, "{kind:?}");
        }
    }

    #[test]
    fn a_record_parses_only_where_it_was_written_and_only_whole() {
        let header = header(Kind::Block, 70_000);
        let bytes = header.encode(&KEY, PLACE);
        assert_eq!(RecordHeader::decode(&bytes, &KEY, PLACE), Ok(header));
        assert!(RecordHeader::decode(&bytes, &[8; 32], PLACE).is_err());
        assert!(RecordHeader::decode(&bytes, &KEY, Place { segment: 4, ..PLACE }).is_err());
        assert!(RecordHeader::decode(&bytes, &KEY, Place { offset: 72, ..PLACE }).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(RecordHeader::decode(&flipped, &KEY, PLACE).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_segment_header_names_its_own_segment() {
        let bytes = encode_segment_header(3, &KEY);
        assert_eq!(decode_segment_header(&bytes, 3), Ok(KEY));
        assert_eq!(decode_segment_header(&bytes, 4), Err(FormatFault::Number(3)));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_segment_header(&flipped, 3).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_tree_has_64_bytes_for_each_group_but_one() {
        for length in [1, 4096, 16_384, 16_385, 32_768, 32_769, 1 << 20] {
            assert_eq!(u64::from(tree_length(length)), bao_tree(length).outboard_size(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(bytes: [u8; 32], more: [u8; 32]) {
            let mut segment = [0; 64];
            segment[..32].copy_from_slice(&bytes);
            segment[32..].copy_from_slice(&more);
            prop_assert!(decode_segment_header(&segment, 1).is_err());
            let mut record = [0; RECORD_HEADER_LENGTH];
            record[..4].copy_from_slice(&RECORD_MAGIC);
            record[4..36].copy_from_slice(&bytes);
            record[36..68].copy_from_slice(&more);
            prop_assert!(RecordHeader::decode(&record, &KEY, PLACE).is_err());
        }
    }
}
