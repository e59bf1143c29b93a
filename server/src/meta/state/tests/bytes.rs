//! The bytes of the rows are frozen.

use holdfast_common::{
    Epoch, Ino, Kind, Piece, Position, Replicas, Sequence, ServerId, Time, cluster::Standing, inventory::BucketDigest,
    net::identity::Role,
};

use super::super::rows::{
    BlockRow, Counters, Dentry, Inode, ServerRow, SessionRow, TokenRow, decode_chunk, decode_holding, decode_pieces,
    encode_holding, encode_pieces,
};
use super::{MOUNT, hash};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn time(secs: i64) -> Time {
    Time { secs, nanos: 7 }
}

fn directory() -> Inode {
    Inode {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 1,
        gid: 2,
        nlink: 3,
        rdev: 4,
        size: 5,
        stored: 6,
        data_version: 7,
        replicas: Replicas::INHERITED,
        atime: time(-1),
        mtime: time(2),
        ctime: time(3),
        btime: time(4),
        parent: Ino(8),
        parent_cookie: 9,
        cookie_next: 10,
    }
}

#[test]
fn rows_have_their_golden_bytes_and_come_back() {
    let inode = directory();
    assert_eq!(
        hex(&inode.encode()),
        "0101ed0100000100000002000000030000000400000005000000000000000600000000000000070000000000000\
         0ffffffffffffffff0700000002000000000000000700000003000000000000000700000004000000000000000700000\
         008000000000000000900000000000000\
         0a00000000000000"
            .replace(' ', "")
    );
    assert_eq!(Inode::decode(&inode.encode()).unwrap(), inode);

    let dentry = Dentry { ino: Ino(2), kind: Kind::Symlink, cookie: 3 };
    assert_eq!(hex(&dentry.encode()), "010200000000000000020300000000000000");
    assert_eq!(Dentry::decode(&dentry.encode()).unwrap(), dentry);
    assert_eq!(Dentry::decode_with(&dentry.encode_with(b"name")).unwrap(), (dentry, b"name".as_slice()));

    let block = BlockRow { refs: 2, holders: vec![ServerId(1), ServerId(3)], ..BlockRow::new(4096, Epoch(0)) };
    assert_eq!(hex(&block.encode()), "010010000002000000000000000100000003000000");
    assert_eq!(BlockRow::decode(&block.encode()).unwrap(), block);
    let block = BlockRow { holders: vec![ServerId(3)], condemned: true, ..BlockRow::new(4096, Epoch(7)) };
    assert_eq!(hex(&block.encode()), "0200100000000000000000000007000000000000000103000000");
    assert_eq!(BlockRow::decode(&block.encode()).unwrap(), block);

    let two = Replicas::new(2).unwrap();
    let block = BlockRow { refs: 1, refs_by_replicas: [0, 1, 0, 0, 0], wanted: 2, ..block };
    let counts = format!("{}0100000000000000{}", "00".repeat(8), "00".repeat(24));
    assert_eq!(hex(&block.encode()), format!("0300100000010000000000000007000000000000000102{counts}03000000"));
    assert_eq!(BlockRow::decode(&block.encode()).unwrap(), block);
    let own = Inode { replicas: two, ..inode.clone() };
    assert_eq!(hex(&own.encode()), format!("02{}02", &hex(&inode.encode())[2..]));
    assert_eq!(Inode::decode(&own.encode()).unwrap(), own);

    let pieces = vec![Piece { offset: 1, length: 2, block: hash(0xab), block_offset: 3 }];
    let row = encode_pieces(&pieces, Replicas::INHERITED);
    assert_eq!(hex(&row), format!("01010000000200000003000000{}", "ab".repeat(32)));
    assert_eq!(decode_chunk(&row).unwrap(), (pieces.clone(), Replicas::INHERITED));
    let row = encode_pieces(&pieces, two);
    assert_eq!(hex(&row), format!("0202010000000200000003000000{}", "ab".repeat(32)));
    assert_eq!(decode_chunk(&row).unwrap(), (pieces.clone(), two));
    assert_eq!(decode_pieces(&row).unwrap(), pieces);

    let holding = BucketDigest { blocks: 5, digest: [0xef; 32] };
    assert_eq!(hex(&encode_holding(&holding)), format!("010500000000000000{}", "ef".repeat(32)));
    assert_eq!(decode_holding(&encode_holding(&holding)).unwrap(), holding);

    let session = SessionRow {
        node: MOUNT,
        instance: [0xcd; 16],
        host: "h".into(),
        mountpoint: "/m".into(),
        answered_below: Sequence(9),
    };
    let expected = format!("010201000000{}01006802002f6d0900000000000000", "cd".repeat(16));
    assert_eq!(hex(&session.encode()), expected);
    assert_eq!(SessionRow::decode(&session.encode()).unwrap(), session);

    let standing = Standing::Serving;
    let server = ServerRow { address: ([10, 0, 0, 1], 7000).into(), zone: "z".into(), standing };
    assert_eq!(hex(&server.encode()), "01040a000001581b000001007a");
    assert_eq!(ServerRow::decode(&server.encode()).unwrap(), server);
    let until = time(5);
    for (standing, bytes) in [
        (Standing::Draining, "01"),
        (Standing::Maintenance { until }, "02050000000000000007000000"),
        (Standing::Leaving, "03"),
    ] {
        let server = ServerRow { standing, ..server.clone() };
        assert_eq!(hex(&server.encode()), format!("02040a000001581b000001007a{bytes}"));
        assert_eq!(ServerRow::decode(&server.encode()).unwrap(), server);
    }

    let token = TokenRow { role: Role::Storage, expires: time(5), used: Some(([0xef; 32], 6)) };
    assert_eq!(hex(&token.encode()), format!("0101050000000000000007000000{}06000000", "ef".repeat(32)));
    assert_eq!(TokenRow::decode(&token.encode()).unwrap(), token);

    let counters = Counters { position: Position(1), blocks_by_copies: [1, 2, 3, 4], ..Counters::default() };
    let decoded = Counters::decode(&counters.encode()).unwrap();
    assert_eq!((decoded, counters.encode().len()), (counters.clone(), 161));
    let numbers = Counters { replicas: two, retargeted: Some(hash(0xab)), ..counters.clone() };
    assert_eq!(Counters::decode(&numbers.encode()).unwrap(), numbers);
    let numbers = Counters { replicas: two, ..counters.clone() };
    assert_eq!(Counters::decode(&numbers.encode()).unwrap(), numbers);
    let from_before_garbage = Counters::decode(&counters.encode()[..129]).unwrap();
    assert_eq!(from_before_garbage, counters);
}

#[test]
fn damaged_rows_are_faults_and_never_panics() {
    let rows = [directory().encode(), Dentry { ino: Ino(2), kind: Kind::File, cookie: 3 }.encode()];
    for row in rows {
        for length in 0..row.len() {
            assert!(Inode::decode(&row[..length]).is_err());
            let _ = Dentry::decode(&row[..length]).is_ok();
            let _ = SessionRow::decode(&row[..length]).is_ok();
            let _ = Counters::decode(&row[..length]).is_ok();
            let _ = TokenRow::decode(&row[..length]).is_ok();
            let _ = ServerRow::decode(&row[..length]).is_ok();
            let _ = decode_pieces(&row[..length]).is_ok();
            let _ = BlockRow::decode(&row[..length]).is_ok();
        }
    }
    assert!(Inode::decode(&[3; 130]).unwrap_err().to_string().contains("version 3"));
}
