//! The bytes of the rows: a version, then little-endian fields. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use holdfast_common::{
    Attr, BlockHash, Epoch, Ino, Kind, Piece, Position, Replicas, Sequence, ServerId, Time,
    cluster::Standing,
    enough_replicas,
    inventory::BucketDigest,
    limits::{REPLICAS, REPLICAS_MAX},
    net::identity::{NodeName, Role},
};

use super::tables::{Result, StorageError, key};

const VERSION: u8 = 1;
/// Of the row of an inode that has a number of copies of its own, and of a chunk whose pieces are counted under one.
const REPLICAS_VERSION: u8 = 2;
/// Of the row of a block that has an epoch.
const BLOCK_EPOCH_VERSION: u8 = 2;
/// Of the row of a block of which somebody wants more or fewer copies than usual.
const BLOCK_VERSION: u8 = 3;
/// Of the row of a storage server that has a standing.
const SERVER_VERSION: u8 = 2;

/// What `inodes` knows of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u32,
    /// Bytes; of a directory, entries; of a symlink, bytes of its target.
    pub size: u64,
    pub stored: u64,
    pub data_version: u64,
    /// Of its blocks; of a directory, of what is made in it.
    pub replicas: Replicas,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Time,
    /// Where a directory is. Zeroes for everything else and for the root.
    pub parent: Ino,
    /// The cookie of the dentry in `parent` that names this directory.
    pub parent_cookie: u64,
    /// The cookie that the next dentry of this directory gets, counted from 1.
    pub cookie_next: u64,
}

impl Inode {
    pub fn attr(&self, ino: Ino) -> Attr {
        Attr {
            ino,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size: self.size,
            stored: self.stored,
            rdev: self.rdev,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            data_version: self.data_version,
            replicas: self.replicas,
        }
    }

    pub fn is_directory(&self) -> bool {
        self.kind == Kind::Directory
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(130);
        out.u8(kind_byte(self.kind));
        [self.mode, self.uid, self.gid, self.nlink, self.rdev].into_iter().for_each(|field| out.u32(field));
        [self.size, self.stored, self.data_version].into_iter().for_each(|field| out.u64(field));
        [self.atime, self.mtime, self.ctime, self.btime].into_iter().for_each(|time| out.time(time));
        if self.is_directory() {
            [self.parent.0, self.parent_cookie, self.cookie_next].into_iter().for_each(|field| out.u64(field));
        }
        if self.replicas != Replicas::INHERITED {
            out.0[0] = REPLICAS_VERSION;
            out.u8(self.replicas.byte());
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (mut row, version) = In::versioned("inode", bytes, REPLICAS_VERSION)?;
        let kind = kind_of(row.u8()?)?;
        let mut inode = Self {
            kind,
            mode: row.u32()?,
            uid: row.u32()?,
            gid: row.u32()?,
            nlink: row.u32()?,
            rdev: row.u32()?,
            size: row.u64()?,
            stored: row.u64()?,
            data_version: row.u64()?,
            replicas: Replicas::INHERITED,
            atime: row.time()?,
            mtime: row.time()?,
            ctime: row.time()?,
            btime: row.time()?,
            parent: Ino(0),
            parent_cookie: 0,
            cookie_next: 0,
        };
        if kind == Kind::Directory {
            inode.parent = Ino(row.u64()?);
            inode.parent_cookie = row.u64()?;
            inode.cookie_next = row.u64()?;
        }
        if version >= REPLICAS_VERSION {
            inode.replicas = row.replicas()?;
        }
        row.end()?;
        Ok(inode)
    }
}

/// A name's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dentry {
    pub ino: Ino,
    pub kind: Kind,
    pub cookie: u64,
}

impl Dentry {
    pub fn encode(self) -> Vec<u8> {
        let mut out = Out::new(18);
        out.u64(self.ino.0);
        out.u8(kind_byte(self.kind));
        out.u64(self.cookie);
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (dentry, name) = Self::decode_with(bytes)?;
        if name.is_empty() { Ok(dentry) } else { Err(StorageError::Damaged("dentry: too long".into())) }
    }

    /// The row under its cookie, which has the name as well: a page of a directory is one scan.
    pub fn encode_with(self, name: &[u8]) -> Vec<u8> {
        let mut row = self.encode();
        row.extend_from_slice(name);
        row
    }

    pub fn decode_with(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let mut row = In::new("dentry", bytes)?;
        let dentry = Self { ino: Ino(row.u64()?), kind: kind_of(row.u8()?)?, cookie: row.u64()? };
        Ok((dentry, row.bytes))
    }
}

/// A block's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRow {
    pub length: u32,
    /// Pieces that name it.
    pub refs: u64,
    /// Those of them whose files have a number of copies of their own: one copy, two, and so on.
    pub refs_by_replicas: [u64; REPLICAS_MAX],
    /// Copies that it should have: the most that any of its files wants.
    pub wanted: usize,
    /// Sorted.
    pub holders: Vec<ServerId>,
    /// Every copy that is put on record from now on is stamped with at least this: another may be deleted at any moment.
    pub epoch: Epoch,
    /// Copies with earlier stamps are being deleted, and no piece may name the block.
    pub condemned: bool,
}

impl BlockRow {
    /// Of a block that nobody names yet.
    pub fn new(length: u32, epoch: Epoch) -> Self {
        Self {
            length,
            refs: 0,
            refs_by_replicas: [0; REPLICAS_MAX],
            wanted: REPLICAS,
            holders: Vec::new(),
            epoch,
            condemned: false,
        }
    }

    /// Copies without which it is not durable.
    pub fn enough(&self) -> usize {
        enough_replicas(self.wanted)
    }

    /// What `wanted` should be when the cluster's number is `default`. Of a block that nobody names, that.
    pub fn most_wanted(&self, default: usize) -> usize {
        let own = (1..=REPLICAS_MAX).rev().find(|count| self.refs_by_replicas[count - 1] > 0);
        let counted = self.refs_by_replicas.iter().fold(0_u64, |sum, count| sum.saturating_add(*count));
        let others = self.refs > counted;
        own.filter(|own| !others || *own > default).unwrap_or(default)
    }

    fn is_usual(&self) -> bool {
        self.wanted == REPLICAS && self.refs_by_replicas == [0; REPLICAS_MAX]
    }

    /// Epochs begin with the first garbage: until then the short form does.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(22 + 4 * self.holders.len());
        out.u32(self.length);
        out.u64(self.refs);
        if self.epoch > Epoch(0) || self.condemned || !self.is_usual() {
            out.0[0] = BLOCK_EPOCH_VERSION;
            out.u64(self.epoch.0);
            out.u8(u8::from(self.condemned));
        }
        if !self.is_usual() {
            out.0[0] = BLOCK_VERSION;
            // At most `REPLICAS_MAX`.
            out.u8(u8::try_from(self.wanted).unwrap_or(u8::MAX));
            self.refs_by_replicas.into_iter().for_each(|field| out.u64(field));
        }
        self.holders.iter().for_each(|holder| out.u32(holder.0));
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (mut row, version) = In::versioned("block", bytes, BLOCK_VERSION)?;
        let mut block = Self::new(row.u32()?, Epoch(0));
        block.refs = row.u64()?;
        if version >= BLOCK_EPOCH_VERSION {
            (block.epoch, block.condemned) = (Epoch(row.u64()?), row.u8()? != 0);
        }
        if version >= BLOCK_VERSION {
            block.wanted = usize::from(row.u8()?);
            for field in &mut block.refs_by_replicas {
                *field = row.u64()?;
            }
        }
        block.holders.reserve_exact(row.bytes.len() / 4);
        while !row.bytes.is_empty() {
            block.holders.push(ServerId(row.u32()?));
        }
        Ok(block)
    }
}

/// What a server is on record for in a bucket.
pub fn encode_holding(digest: &BucketDigest) -> Vec<u8> {
    let mut out = Out::new(41);
    out.u64(digest.blocks);
    out.bytes(&digest.digest);
    out.0
}

pub fn decode_holding(bytes: &[u8]) -> Result<BucketDigest> {
    let mut row = In::new("holding", bytes)?;
    Ok(BucketDigest { blocks: row.u64()?, digest: row.array()? })
}

/// The pieces of a chunk, and the number of copies under which its blocks' rows count them.
pub fn encode_pieces(pieces: &[Piece], replicas: Replicas) -> Vec<u8> {
    let mut out = Out::new(2 + 44 * pieces.len());
    if replicas != Replicas::INHERITED {
        out.0[0] = REPLICAS_VERSION;
        out.u8(replicas.byte());
    }
    for piece in pieces {
        [piece.offset, piece.length, piece.block_offset].into_iter().for_each(|field| out.u32(field));
        out.bytes(&piece.block.0);
    }
    out.0
}

pub fn decode_pieces(bytes: &[u8]) -> Result<Vec<Piece>> {
    Ok(decode_chunk(bytes)?.0)
}

/// What [`encode_pieces`] was given.
pub fn decode_chunk(bytes: &[u8]) -> Result<(Vec<Piece>, Replicas)> {
    let (mut row, version) = In::versioned("pieces", bytes, REPLICAS_VERSION)?;
    let replicas = if version >= REPLICAS_VERSION { row.replicas()? } else { Replicas::INHERITED };
    let mut pieces = Vec::with_capacity(row.bytes.len() / 44);
    while !row.bytes.is_empty() {
        let (offset, length, block_offset) = (row.u32()?, row.u32()?, row.u32()?);
        pieces.push(Piece { offset, length, block_offset, block: BlockHash(row.array()?) });
    }
    Ok((pieces, replicas))
}

/// What a mount told when it opened its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRow {
    pub node: NodeName,
    pub instance: [u8; 16],
    pub host: String,
    pub mountpoint: String,
    /// Replies below this have been dropped.
    pub answered_below: Sequence,
}

impl SessionRow {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(64);
        out.u8(key::role(self.node.role));
        out.u32(self.node.id);
        out.bytes(&self.instance);
        out.text(&self.host);
        out.text(&self.mountpoint);
        out.u64(self.answered_below.0);
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut row = In::new("session", bytes)?;
        let session = Self {
            node: NodeName { role: role_of(row.u8()?)?, id: row.u32()? },
            instance: row.array()?,
            host: row.text()?,
            mountpoint: row.text()?,
            answered_below: Sequence(row.u64()?),
        };
        row.end()?;
        Ok(session)
    }
}

/// A storage server that has reported itself at least once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerRow {
    pub address: SocketAddr,
    pub zone: String,
    /// Never `Removed`: such a server has no row.
    pub standing: Standing,
}

impl ServerRow {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(32);
        match self.address.ip() {
            IpAddr::V4(ip) => {
                out.u8(4);
                out.bytes(&ip.octets());
            }
            IpAddr::V6(ip) => {
                out.u8(6);
                out.bytes(&ip.octets());
            }
        }
        out.u32(u32::from(self.address.port()));
        out.text(&self.zone);
        if self.standing != Standing::Serving {
            out.0[0] = SERVER_VERSION;
            out.u8(standing_byte(self.standing));
            if let Standing::Maintenance { until } = self.standing {
                out.time(until);
            }
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (mut row, version) = In::versioned("server", bytes, SERVER_VERSION)?;
        let ip: IpAddr = match row.u8()? {
            4 => Ipv4Addr::from(row.array::<4>()?).into(),
            6 => Ipv6Addr::from(row.array::<16>()?).into(),
            _ => return Err(row.damaged("address family")),
        };
        let port = u16::try_from(row.u32()?).map_err(|_| row.damaged("port"))?;
        let mut server = Self { address: (ip, port).into(), zone: row.text()?, standing: Standing::Serving };
        if version >= SERVER_VERSION {
            server.standing = match row.u8()? {
                1 => Standing::Draining,
                2 => Standing::Maintenance { until: row.time()? },
                3 => Standing::Leaving,
                _ => return Err(row.damaged("standing")),
            };
        }
        row.end()?;
        Ok(server)
    }
}

/// Of one that a row can have.
fn standing_byte(standing: Standing) -> u8 {
    match standing {
        Standing::Serving | Standing::Removed => 0,
        Standing::Draining => 1,
        Standing::Maintenance { .. } => 2,
        Standing::Leaving => 3,
    }
}

/// A right to one certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRow {
    pub role: Role,
    pub expires: Time,
    /// BLAKE3 of the signing request that used it up, and the id that it got.
    pub used: Option<([u8; 32], u32)>,
}

impl TokenRow {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(50);
        out.u8(key::role(self.role));
        out.time(self.expires);
        if let Some((csr, id)) = &self.used {
            out.bytes(csr);
            out.u32(*id);
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut row = In::new("token", bytes)?;
        let (role, expires) = (role_of(row.u8()?)?, row.time()?);
        let used = if row.bytes.is_empty() { None } else { Some((row.array()?, row.u32()?)) };
        row.end()?;
        Ok(Self { role, expires, used })
    }
}

/// Everything that is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Entries applied.
    pub position: Position,
    pub ino_next: u64,
    pub session_next: u64,
    /// Next id of a certificate, by role's byte.
    pub node_next: [u32; 4],
    pub inodes: u64,
    /// Blocks that a piece names, by number of copies: none, one, two, three or more.
    pub blocks_by_copies: [u64; 4],
    pub owed: u64,
    /// Blocks that no piece names.
    pub unnamed: u64,
    pub copies_made: u64,
    pub corrupt_met: u64,
    pub missing_met: u64,
    pub repaired: u64,
    /// Of the newest condemnation.
    pub epoch: Epoch,
    /// The latest epoch under which a block was forgotten that had been condemned.
    pub forgotten: Epoch,
    /// Blocks that are condemned now.
    pub condemned: u64,
    /// Blocks that were forgotten.
    pub collected: u64,
    /// Copies of what has no number of its own.
    pub replicas: Replicas,
    /// That number has changed, and the rows of blocks up to this one follow it.
    pub retargeted: Option<BlockHash>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            position: Position(0),
            ino_next: Ino::ROOT.0 + 1,
            session_next: 1,
            // `holdfast init` has made the first metadata server's and the first admin's certificate.
            node_next: [2, 1, 1, 2],
            inodes: 0,
            blocks_by_copies: [0; 4],
            owed: 0,
            unnamed: 0,
            copies_made: 0,
            corrupt_met: 0,
            missing_met: 0,
            repaired: 0,
            epoch: Epoch(0),
            forgotten: Epoch(0),
            condemned: 0,
            collected: 0,
            replicas: Replicas::INHERITED,
            retargeted: None,
        }
    }
}

impl Counters {
    /// Blocks that are owed a copy and have one from which it can be made, now or when somebody is back: the others are lost.
    pub fn payable(&self) -> u64 {
        self.owed.saturating_sub(self.blocks_by_copies[0])
    }

    /// Copies of what has no number of its own.
    pub fn replicas(&self) -> usize {
        self.replicas.or(REPLICAS)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out::new(172);
        [self.position.0, self.ino_next, self.session_next].into_iter().for_each(|field| out.u64(field));
        self.node_next.into_iter().for_each(|field| out.u32(field));
        out.u64(self.inodes);
        self.blocks_by_copies.into_iter().for_each(|field| out.u64(field));
        [self.owed, self.unnamed, self.copies_made, self.corrupt_met, self.missing_met, self.repaired]
            .into_iter()
            .for_each(|field| out.u64(field));
        [self.epoch.0, self.forgotten.0, self.condemned, self.collected].into_iter().for_each(|field| out.u64(field));
        if self.replicas != Replicas::INHERITED || self.retargeted.is_some() {
            out.u8(self.replicas.byte());
            self.retargeted.iter().for_each(|hash| out.bytes(&hash.0));
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut row = In::new("counters", bytes)?;
        let mut counters = Self {
            position: Position(row.u64()?),
            ino_next: row.u64()?,
            session_next: row.u64()?,
            node_next: [row.u32()?, row.u32()?, row.u32()?, row.u32()?],
            inodes: row.u64()?,
            blocks_by_copies: [row.u64()?, row.u64()?, row.u64()?, row.u64()?],
            owed: row.u64()?,
            unnamed: row.u64()?,
            copies_made: row.u64()?,
            corrupt_met: row.u64()?,
            missing_met: row.u64()?,
            repaired: row.u64()?,
            ..Self::default()
        };
        // Tables from before the first garbage end here.
        if !row.bytes.is_empty() {
            counters.epoch = Epoch(row.u64()?);
            counters.forgotten = Epoch(row.u64()?);
            counters.condemned = row.u64()?;
            counters.collected = row.u64()?;
        }
        if !row.bytes.is_empty() {
            counters.replicas = row.replicas()?;
        }
        if !row.bytes.is_empty() {
            counters.retargeted = Some(BlockHash(row.array()?));
        }
        row.end()?;
        Ok(counters)
    }
}

fn kind_byte(kind: Kind) -> u8 {
    match kind {
        Kind::File => 0,
        Kind::Directory => 1,
        Kind::Symlink => 2,
        Kind::Fifo => 3,
        Kind::Socket => 4,
        Kind::CharDevice => 5,
        Kind::BlockDevice => 6,
    }
}

fn kind_of(byte: u8) -> Result<Kind> {
    const KINDS: [Kind; 7] =
        [Kind::File, Kind::Directory, Kind::Symlink, Kind::Fifo, Kind::Socket, Kind::CharDevice, Kind::BlockDevice];
    KINDS.get(usize::from(byte)).copied().ok_or_else(|| StorageError::Damaged(format!("there is no kind {byte}")))
}

fn role_of(byte: u8) -> Result<Role> {
    const ROLES: [Role; 4] = [Role::Meta, Role::Storage, Role::Client, Role::Admin];
    ROLES.get(usize::from(byte)).copied().ok_or_else(|| StorageError::Damaged(format!("there is no role {byte}")))
}

struct Out(Vec<u8>);

impl Out {
    fn new(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.push(VERSION);
        Self(bytes)
    }
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
    fn time(&mut self, time: Time) {
        self.bytes(&time.secs.to_le_bytes());
        self.u32(time.nanos);
    }
    fn bytes(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }
    /// At most 64 KiB, which every caller has checked; a longer one would be cut.
    fn text(&mut self, text: &str) {
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.bytes(&length.to_le_bytes());
        self.bytes(&text.as_bytes()[..usize::from(length)]);
    }
}

struct In<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> In<'a> {
    fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self> {
        Ok(Self::versioned(what, bytes, VERSION)?.0)
    }
    fn versioned(what: &'static str, bytes: &'a [u8], newest: u8) -> Result<(Self, u8)> {
        let mut row = Self { what, bytes };
        match row.u8()? {
            version if (VERSION..=newest).contains(&version) => Ok((row, version)),
            found => Err(StorageError::Damaged(format!("{what}: version {found}, newest known is {newest}"))),
        }
    }
    fn damaged(&self, field: &str) -> StorageError {
        StorageError::Damaged(format!("{}: {field}", self.what))
    }
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(length).ok_or_else(|| self.damaged("too short"))?;
        self.bytes = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| self.damaged("too short"))
    }
    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn replicas(&mut self) -> Result<Replicas> {
        Replicas::from_byte(self.u8()?).ok_or_else(|| self.damaged("number of copies"))
    }
    fn time(&mut self) -> Result<Time> {
        Ok(Time { secs: i64::from_le_bytes(self.array()?), nanos: self.u32()? })
    }
    fn text(&mut self) -> Result<String> {
        let length = u16::from_le_bytes(self.array()?);
        let bytes = self.take(usize::from(length))?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.damaged("text"))
    }
    fn end(&self) -> Result<()> {
        if self.bytes.is_empty() { Ok(()) } else { Err(self.damaged("too long")) }
    }
}
