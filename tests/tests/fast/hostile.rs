//! Hostile bytes against every decoder: a refusal, never a panic and never a large allocation.

use holdfast_common::{
    limits::HEADER_SIZE_MAX,
    wire::{
        codec::{decode, encode},
        enrol::{EnrolReply, EnrolRequest},
        meta::{MetaReply, MetaRequest},
        storage::{StorageReply, StorageRequest},
    },
};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};

use crate::golden;

/// What decodes must encode to the very bytes it came from: nothing is ambiguous.
fn check<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(message) = decode::<T>(bytes) {
        assert_eq!(encode(&message).expect("what was short enough to decode can be encoded"), bytes);
    }
}

fn check_all(bytes: &[u8]) {
    check::<MetaRequest>(bytes);
    check::<MetaReply>(bytes);
    check::<StorageRequest>(bytes);
    check::<StorageReply>(bytes);
    check::<EnrolRequest>(bytes);
    check::<EnrolReply>(bytes);
}

/// A good message with a few bytes replaced, and perhaps cut.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let good: Vec<Vec<u8>> = golden::samples().into_iter().map(|sample| sample.bytes).collect();
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (proptest::sample::select(good), changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(mut bytes, changes, cut, shortens)| {
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if shortens {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_refused_or_unambiguous(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        check_all(&bytes);
    }

    #[test]
    fn damaged_messages_are_refused_or_unambiguous(bytes in damaged()) {
        check_all(&bytes);
    }
}

#[test]
fn a_message_past_the_limit_is_refused_unread() {
    let bytes = vec![0; HEADER_SIZE_MAX + 1];
    assert!(decode::<MetaRequest>(&bytes).is_err() && decode::<StorageReply>(&bytes).is_err());
}
