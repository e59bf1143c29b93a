//! redb on the disk seam: a `StorageBackend` over any [`DiskFile`].
//!
//! It takes no lock: the data directory's lock keeps a second process out.

use std::{io, sync::Arc};

use holdfast_common::disk::DiskFile;
use redb::StorageBackend;

#[derive(Debug)]
pub struct RedbFile(Arc<dyn DiskFile>);

impl RedbFile {
    pub fn new(file: Arc<dyn DiskFile>) -> Self {
        Self(file)
    }
}

impl StorageBackend for RedbFile {
    fn len(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use holdfast_common::disk::{Disk, RealDisk};
    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    #[test]
    fn a_database_survives_being_closed_and_opened() {
        const TABLE: TableDefinition<u64, u64> = TableDefinition::new("t");
        let directory = tempfile::tempdir().unwrap();
        let open = || {
            let file = RealDisk.open(&directory.path().join("db"), true).unwrap();
            redb::Builder::new().create_with_backend(RedbFile::new(file)).unwrap()
        };
        let database = open();
        let write = database.begin_write().unwrap();
        write.open_table(TABLE).unwrap().insert(1, 2).unwrap();
        write.commit().unwrap();
        drop(database);
        let database = open();
        let read = database.begin_read().unwrap();
        assert_eq!(read.open_table(TABLE).unwrap().get(1).unwrap().map(|value| value.value()), Some(2));
    }
}
