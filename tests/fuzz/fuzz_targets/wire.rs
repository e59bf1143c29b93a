//! The first byte chooses the decoder, the rest is what it is given. What decodes must encode to the same bytes.
#![no_main]

use holdfast_common::wire::{
    codec::{decode, encode},
    enrol::{EnrolReply, EnrolRequest},
    meta::{MetaReply, MetaRequest},
    storage::{StorageReply, StorageRequest},
};
use libfuzzer_sys::fuzz_target;

fn check<T: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
    if let Ok(message) = decode::<T>(bytes) {
        assert_eq!(encode(&message).expect("what was decoded can be encoded"), bytes);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    match choice % 6 {
        0 => check::<MetaRequest>(bytes),
        1 => check::<MetaReply>(bytes),
        2 => check::<StorageRequest>(bytes),
        3 => check::<StorageReply>(bytes),
        4 => check::<EnrolRequest>(bytes),
        _ => check::<EnrolReply>(bytes),
    }
});
