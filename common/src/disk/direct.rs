//! Reading straight from the disk (O_DIRECT), past the kernel's memory of files.
//!
//! What is read once takes nobody's place there, and is copied once less, into memory that the next read uses again.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    sync::{Mutex, OnceLock, PoisonError},
};

use bytes::Bytes;

use crate::limits::BLOCK_SIZE_MAX;

/// Of offsets, lengths and memory: enough for every disk.
const ALIGNMENT: usize = 4096;
/// A block with all that is beside it, from page to page.
const BUFFER_BYTES: usize = BLOCK_SIZE_MAX as usize + (64 << 10);
/// Buffers that wait for their next use.
const IDLE_MAX: usize = 8;

static IDLE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A file's second descriptor, opened when it is first needed; none where that is not possible.
#[derive(Debug, Default)]
pub(super) struct Direct(OnceLock<Option<fs::File>>);

impl Direct {
    /// `None`: these bytes of this file must be read in the ordinary way.
    #[expect(clippy::cast_possible_truncation, reason = "less than a page")]
    pub(super) fn read(&self, file: &fs::File, offset: u64, length: usize) -> io::Result<Option<Bytes>> {
        let start = offset - offset % ALIGNMENT as u64;
        let skip = (offset % ALIGNMENT as u64) as usize;
        let end = skip + length;
        let Some(direct) = self.file(file).filter(|_| end <= BUFFER_BYTES) else { return Ok(None) };
        let mut buffer = Buffer::take();
        match fill(direct, &mut buffer.as_mut()[..end.next_multiple_of(ALIGNMENT)], start, end) {
            Ok(()) => Ok(Some(Bytes::from_owner(buffer).slice(skip..end))),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn file(&self, file: &fs::File) -> Option<&fs::File> {
        if self.0.get().is_none() {
            match open(file) {
                Ok(direct) => drop(self.0.set(Some(direct))),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => drop(self.0.set(None)),
                // No descriptors, say: the next read tries again.
                Err(error) => tracing::debug!(%error, "a file cannot be opened a second time"),
            }
        }
        self.0.get()?.as_ref()
    }
}

fn open(file: &fs::File) -> io::Result<fs::File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Reads until at least `wanted` bytes of `buffer` are there.
fn fill(file: &fs::File, buffer: &mut [u8], start: u64, wanted: usize) -> io::Result<()> {
    let mut done = 0;
    while done < wanted {
        match file.read_at(&mut buffer[done..], start + done as u64) {
            Ok(more) => {
                done += more;
                // Only the end of the file ends within a page.
                if done < wanted && (more == 0 || more % ALIGNMENT != 0) {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Aligned memory, which goes back where it came from.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn take() -> Self {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = idle.unwrap_or_else(|| vec![0; BUFFER_BYTES + ALIGNMENT]);
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..][..BUFFER_BYTES]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..BUFFER_BYTES]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(std::mem::take(&mut self.memory));
        }
    }
}
