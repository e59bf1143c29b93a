//! The only user of bincode: bounded, little-endian, fixed-width bytes for headers and log entries.
//!
//! The bytes are those of bincode 1.3's default, which several maintained crates can write, so that
//! this codec can be replaced without a change on the wire or on disk.

use serde::{Serialize, de::DeserializeOwned};

use crate::limits::HEADER_SIZE_MAX;

#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("the message does not decode: {0}")]
    Malformed(String),
    #[error("{trailing} bytes follow the end of the message")]
    Trailing { trailing: usize },
    #[error("the message has {length} bytes, at most {HEADER_SIZE_MAX} are allowed")]
    TooLong { length: usize },
}

fn config() -> impl bincode::config::Config {
    bincode::config::legacy().with_limit::<HEADER_SIZE_MAX>()
}

/// Encodes `message`; fails only when it is longer than `HEADER_SIZE_MAX`.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(message, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if bytes.len() > HEADER_SIZE_MAX {
        return Err(CodecError::TooLong { length: bytes.len() });
    }
    Ok(bytes)
}

/// Decodes exactly all of `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > HEADER_SIZE_MAX {
        return Err(CodecError::TooLong { length: bytes.len() });
    }
    let (message, consumed) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    match bytes.len() - consumed {
        0 => Ok(message),
        trailing => Err(CodecError::Trailing { trailing }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{enrol, meta, storage};

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<meta::MetaRequest>(&bytes).is_ok();
            let _ = decode::<meta::MetaReply>(&bytes).is_ok();
            let _ = decode::<storage::StorageRequest>(&bytes).is_ok();
            let _ = decode::<storage::StorageReply>(&bytes).is_ok();
            let _ = decode::<enrol::EnrolRequest>(&bytes).is_ok();
            let _ = decode::<enrol::EnrolReply>(&bytes).is_ok();
        }
    }

    #[test]
    fn trailing_bytes_and_short_messages_are_refused() {
        let mut bytes = encode(&(1u32, "name")).unwrap();
        assert!(decode::<(u32, String)>(&bytes).is_ok());
        assert!(decode::<(u32, String)>(&bytes[..bytes.len() - 1]).is_err());
        bytes.push(0);
        assert!(matches!(decode::<(u32, String)>(&bytes), Err(CodecError::Trailing { trailing: 1 })));
    }

    #[test]
    fn a_hostile_length_does_not_allocate() {
        let bytes = u64::MAX.to_le_bytes();
        assert!(decode::<Vec<u8>>(&bytes).is_err());
        assert!(decode::<String>(&(1u64 << 40).to_le_bytes()).is_err());
    }
}
