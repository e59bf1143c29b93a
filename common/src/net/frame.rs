//! One message on a stream: two lengths (u32 LE: header, payload), the header, the payload.
//!
//! The lengths are checked before anything is allocated for them, and the bytes taken from a budget when there is one.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Frame;
use crate::limits::{HEADER_SIZE_MAX, PAYLOAD_SIZE_MAX};

const PREAMBLE_SIZE: usize = 8;
/// Bytes of a frame that overtakes longer ones on the same connection: a question need not wait for blocks before it.
const URGENT_SIZE_MAX: usize = 16 << 10;
/// Chunks taken from a stream under one lock of its connection.
const READ_BATCH: usize = 32;

/// A stream's code for "nobody wants this any more".
pub(super) const CODE_CANCELLED: VarInt = VarInt::from_u32(0);
/// A stream's code for a frame that breaks the format.
pub(super) const CODE_MALFORMED: VarInt = VarInt::from_u32(1);

#[derive(Clone, Copy, Debug)]
pub(super) struct FrameLimits {
    pub header: usize,
    pub payload: usize,
}

impl FrameLimits {
    pub(super) const NORMAL: Self = Self { header: HEADER_SIZE_MAX, payload: PAYLOAD_SIZE_MAX };
    /// Enough for a request or an answer of enrolment, from or to somebody unknown.
    pub(super) const ENROL: Self = Self { header: 16 << 10, payload: 0 };
}

#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("the frame announces a header of {header} and a payload of {payload} bytes, more than is allowed")]
    TooLong { header: usize, payload: usize },
    #[error("the frame ends before its announced length")]
    Short,
    #[error("bytes follow the end of the frame")]
    Trailing,
    #[error("the other side refuses the frame as malformed")]
    Refused,
    #[error("the other side dropped the request")]
    Dropped,
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error("the stream failed: {0}")]
    Stream(String),
}

impl From<ReadError> for FrameError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(CODE_MALFORMED) => Self::Refused,
            ReadError::Reset(_) => Self::Dropped,
            ReadError::ConnectionLost(error) => Self::Connection(error),
            other => Self::Stream(other.to_string()),
        }
    }
}

impl From<ReadExactError> for FrameError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Short,
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

impl From<WriteError> for FrameError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(CODE_MALFORMED) => Self::Refused,
            WriteError::Stopped(_) => Self::Dropped,
            WriteError::ConnectionLost(error) => Self::Connection(error),
            other => Self::Stream(other.to_string()),
        }
    }
}

/// Bytes of requests that may be in memory at once, in units of 1 KiB.
#[derive(Clone, Debug)]
pub(super) struct ByteBudget(Arc<Semaphore>);

impl ByteBudget {
    const UNIT: usize = 1024;

    /// At least one frame of the largest size always fits.
    pub(super) fn new(bytes: usize) -> Self {
        let units = bytes.max(HEADER_SIZE_MAX + PAYLOAD_SIZE_MAX).div_ceil(Self::UNIT) + 1;
        Self(Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))))
    }

    /// Waits until `bytes`, at most one frame, are free. `None` never happens: the semaphore is not closed.
    async fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(Self::UNIT)).ok()?;
        self.0.clone().acquire_many_owned(units).await.ok()
    }
}

fn payload_length(frame: &Frame) -> usize {
    frame.payload.iter().map(Bytes::len).sum()
}

fn preamble(frame: &Frame, limits: FrameLimits) -> Result<[u8; PREAMBLE_SIZE], FrameError> {
    let (header, payload) = (frame.header.len(), payload_length(frame));
    let too_long = || FrameError::TooLong { header, payload };
    if header > limits.header || payload > limits.payload {
        return Err(too_long());
    }
    let header = u32::try_from(header).map_err(|_| too_long())?;
    let payload = u32::try_from(payload).map_err(|_| too_long())?;
    Ok((u64::from(header) | (u64::from(payload) << 32)).to_le_bytes())
}

/// Sends `frame` and ends the stream. The payload's parts are handed over, not copied.
pub(super) async fn write(send: &mut SendStream, frame: Frame, limits: FrameLimits) -> Result<(), FrameError> {
    let preamble = preamble(&frame, limits)?;
    if frame.header.len() + payload_length(&frame) <= URGENT_SIZE_MAX {
        send.set_priority(1).map_err(|e| FrameError::Stream(e.to_string()))?;
    }
    let mut chunks = Vec::with_capacity(2 + frame.payload.len());
    chunks.push(Bytes::copy_from_slice(&preamble));
    chunks.push(Bytes::from(frame.header));
    chunks.extend(frame.payload);
    chunks.retain(|chunk| !chunk.is_empty());
    send.write_all_chunks(&mut chunks).await?;
    send.finish().map_err(|e| FrameError::Stream(e.to_string()))
}

/// Receives one frame and the end of the stream. The permit is what `budget` lent for the frame's bytes.
pub(super) async fn read(
    recv: &mut RecvStream,
    limits: FrameLimits,
    budget: Option<&ByteBudget>,
) -> Result<(Frame, Option<OwnedSemaphorePermit>), FrameError> {
    let mut preamble = [0; PREAMBLE_SIZE];
    recv.read_exact(&mut preamble).await?;
    let (header_length, payload_length) = announced(preamble, limits)?;
    let permit = match budget {
        Some(budget) => budget.take(header_length + payload_length).await,
        None => None,
    };
    let mut header = vec![0; header_length];
    recv.read_exact(&mut header).await?;
    let payload = read_payload(recv, payload_length).await?;
    let payload = if payload.is_empty() { Vec::new() } else { vec![payload] };
    Ok((Frame { header, payload }, permit))
}

fn announced(preamble: [u8; PREAMBLE_SIZE], limits: FrameLimits) -> Result<(usize, usize), FrameError> {
    let both = u64::from_le_bytes(preamble);
    let header = usize::try_from(both & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    let payload = usize::try_from(both >> 32).unwrap_or(usize::MAX);
    if header > limits.header || payload > limits.payload {
        return Err(FrameError::TooLong { header, payload });
    }
    Ok((header, payload))
}

/// One copy, from the packets into one buffer that was not zeroed before.
async fn read_payload(recv: &mut RecvStream, length: usize) -> Result<Bytes, FrameError> {
    let mut payload = BytesMut::with_capacity(length);
    let mut chunks = [const { Bytes::new() }; READ_BATCH];
    while let Some(count) = recv.read_chunks(&mut chunks).await? {
        for chunk in &mut chunks[..count] {
            if chunk.len() > length - payload.len() {
                return Err(FrameError::Trailing);
            }
            payload.extend_from_slice(chunk);
            *chunk = Bytes::new();
        }
    }
    if payload.len() < length {
        return Err(FrameError::Short);
    }
    Ok(payload.freeze())
}

/// A stream that is reset, not finished, when it is dropped half-way: quinn would finish it, and
/// the other side could take what it has for all there is.
#[derive(Debug)]
pub(super) struct ResetOnDrop {
    pub stream: SendStream,
    armed: bool,
}

impl ResetOnDrop {
    pub(super) fn new(stream: SendStream) -> Self {
        Self { stream, armed: true }
    }

    /// The stream has done its work. A reset now would take back what is still on its way.
    pub(super) fn disarm(mut self) {
        self.armed = false;
    }

    /// Tells the other side why, instead of that nobody wants this any more.
    pub(super) fn reset(mut self, code: VarInt) {
        self.armed = false;
        reset(&mut self.stream, code);
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if self.armed {
            reset(&mut self.stream, CODE_CANCELLED);
        }
    }
}

fn reset(stream: &mut SendStream, code: VarInt) {
    if let Err(closed) = stream.reset(code) {
        tracing::trace!(%closed, "the stream had ended before it was reset");
    }
}

/// Asks the other side not to send the rest.
pub(super) fn stop(stream: &mut RecvStream, code: VarInt) {
    if let Err(closed) = stream.stop(code) {
        tracing::trace!(%closed, "the stream had ended before it was stopped");
    }
}
