//! The part of a file's map that this client knows: pieces by chunk, and where their blocks are. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use holdfast_common::{
    BlockHash, ChunkIndex, Piece, pieces,
    wire::meta::{BlockPlace, FileMap},
};

/// Chunks of one file past which the map is dropped and read again as needed.
const CHUNKS_MAX: usize = 8192;

/// Places that are not worth looking through.
const PLACES_MIN: usize = 256;

/// Pieces as of `version`. A chunk that is missing is unknown, unless the map is complete: then it is all hole.
#[derive(Debug, Default)]
pub struct KnownMap {
    version: u64,
    complete: bool,
    chunks: BTreeMap<ChunkIndex, Arc<Vec<Piece>>>,
    places: BTreeMap<BlockHash, Arc<BlockPlace>>,
    /// With more places than these it is time to look for those that no piece names any more.
    shed_at: usize,
}

impl KnownMap {
    /// Of a file that has no byte stored.
    pub fn empty(version: u64) -> Self {
        Self { version, complete: true, ..Self::default() }
    }

    pub fn version(&self) -> u64 {
        self.version
    }

    /// The pieces of a chunk: `None` when they have to be asked for.
    pub fn pieces(&self, chunk: ChunkIndex) -> Option<Arc<Vec<Piece>>> {
        match self.chunks.get(&chunk) {
            Some(pieces) => Some(Arc::clone(pieces)),
            None if self.complete => Some(Arc::default()),
            None => None,
        }
    }

    pub fn place(&self, block: BlockHash) -> Option<Arc<BlockPlace>> {
        self.places.get(&block).cloned()
    }

    /// Forgets everything: the file is now at `version`, changed by something that this map does not know.
    pub fn forget(&mut self, version: u64) {
        *self = Self { version: self.version.max(version), ..Self::default() };
    }

    /// Forgets everything, though the version is right: the places of blocks may have changed.
    pub fn forget_all(&mut self) {
        self.forget(self.version);
    }

    /// Takes in an answer about chunks `first..first+count` of a file that has `file_chunks` at the answer's version
    /// (`u32::MAX`: that is not known). `false` if the answer is older than what is known, and was left out.
    pub fn learn(&mut self, first: ChunkIndex, count: u32, file_chunks: u32, answer: FileMap) -> bool {
        if answer.data_version < self.version {
            return false;
        }
        if answer.data_version > self.version || self.chunks.len() > CHUNKS_MAX {
            self.forget(answer.data_version);
        }
        for chunk in first.0..first.0.saturating_add(count).min(file_chunks.max(first.0 + 1)) {
            self.chunks.insert(ChunkIndex(chunk), Arc::default());
        }
        let mut whole = first.0 == 0 && count >= file_chunks;
        for (chunk, pieces) in answer.chunks {
            if pieces::are_ordered(&pieces) {
                self.chunks.insert(chunk, Arc::new(pieces));
            } else {
                // A broken answer must not read as a hole.
                self.chunks.remove(&chunk);
                whole = false;
            }
        }
        self.places.extend(answer.blocks.into_iter().map(|place| (place.hash, Arc::new(place))));
        self.complete |= whole;
        true
    }

    /// Takes in a commit of this client that brought the file to `version`.
    pub fn commit(&mut self, version: u64, new: &[(ChunkIndex, Piece)], places: &[BlockPlace]) {
        if version <= self.version {
            // The map was read after this commit was applied, and has it already.
            return;
        }
        if version > self.version + 1 {
            return self.forget(version);
        }
        self.version = version;
        for (chunk, piece) in new {
            if let Some(mut pieces) = self.pieces(*chunk) {
                pieces::lay_over(Arc::make_mut(&mut pieces), *piece);
                self.chunks.insert(*chunk, pieces);
            }
        }
        self.places.extend(places.iter().map(|place| (place.hash, Arc::new(place.clone()))));
        self.shed();
    }

    /// Drops places that no known piece names any more, when as many have been added as there were: each commit pays for a few.
    fn shed(&mut self) {
        if self.places.len() <= self.shed_at.max(PLACES_MIN) {
            return;
        }
        let named: BTreeSet<BlockHash> =
            self.chunks.values().flat_map(|pieces| pieces.iter().map(|piece| piece.block)).collect();
        self.places.retain(|hash, _| named.contains(hash));
        self.shed_at = 2 * self.places.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_looked_through_now_and_then_only_and_stay_few() {
        let mut map = KnownMap::empty(1);
        let hash = |number: u32| BlockHash::of(&number.to_le_bytes());
        let place = |number| BlockPlace { hash: hash(number), length: 4096, holders: Vec::new() };
        let (mut looks, mut shed_at) = (0, 0);
        // Each of a thousand chunks is written over, again and again.
        for number in 0..10_000_u32 {
            let piece = Piece { offset: 0, length: 4096, block: hash(number), block_offset: 0 };
            map.commit(u64::from(number) + 2, &[(ChunkIndex(number % 1000), piece)], &[place(number)]);
            looks += u32::from(std::mem::replace(&mut shed_at, map.shed_at) != map.shed_at);
            assert!(map.places.len() <= 2 * 1000 + PLACES_MIN);
        }
        assert!(looks <= 16, "{looks} times");
        assert!((9000..10_000).all(|number| map.place(hash(number)).is_some()));
    }

    fn piece(offset: u32, block: u8) -> Piece {
        Piece { offset, length: 10, block: BlockHash([block; 32]), block_offset: 0 }
    }

    fn answer(version: u64, chunk: u32, block: u8) -> FileMap {
        FileMap { data_version: version, chunks: vec![(ChunkIndex(chunk), vec![piece(0, block)])], blocks: Vec::new() }
    }

    fn first_block(map: &KnownMap, chunk: u32) -> Option<Option<u8>> {
        map.pieces(ChunkIndex(chunk)).map(|pieces| pieces.first().map(|piece| piece.block.0[0]))
    }

    #[test]
    fn own_commits_are_laid_over_what_is_known() {
        let mut map = KnownMap::empty(1);
        map.commit(2, &[(ChunkIndex(0), piece(0, 7))], &[]);
        assert_eq!((first_block(&map, 0), first_block(&map, 5)), (Some(Some(7)), Some(None)));
    }

    #[test]
    fn a_commit_by_someone_else_in_between_makes_everything_unknown() {
        let mut map = KnownMap::empty(1);
        map.commit(3, &[(ChunkIndex(0), piece(0, 7))], &[]);
        assert_eq!((first_block(&map, 0), map.version()), (None, 3));
    }

    #[test]
    fn an_answer_older_than_a_commit_is_left_out() {
        let mut map = KnownMap::default();
        assert!(map.learn(ChunkIndex(0), 2, 4, answer(1, 0, 1)));
        map.commit(2, &[(ChunkIndex(0), piece(0, 7))], &[]);
        assert!(!map.learn(ChunkIndex(0), 2, 4, answer(1, 0, 1)));
        assert_eq!(
            (first_block(&map, 0), first_block(&map, 1), first_block(&map, 3)),
            (Some(Some(7)), Some(None), None)
        );
    }

    #[test]
    fn a_commit_that_the_answer_already_has_is_not_laid_twice() {
        let mut map = KnownMap::default();
        assert!(map.learn(ChunkIndex(0), 9, 1, answer(5, 0, 9)));
        map.commit(5, &[(ChunkIndex(0), piece(0, 7))], &[]);
        assert_eq!((first_block(&map, 0), first_block(&map, 3)), (Some(Some(9)), Some(None)));
    }
}
