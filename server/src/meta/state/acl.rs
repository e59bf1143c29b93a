//! POSIX access control lists: what a file's, or a directory's default one, does to modes.
//!
//! They are kept as the extended attributes that the kernel reads and obeys (`system.posix_acl_access` and
//! `system.posix_acl_default`, version 2: a little-endian u32 2, then entries of tag u16, permissions u16, id u32). What is here is
//! what a filesystem owes it, as in Linux's `fs/posix_acl.c`: an access list and the mode say the same, and new inodes
//! inherit. Pure.

use holdfast_common::{
    Ino, Kind, Refusal,
    mode::{HAS_ACCESS_LIST, HAS_DEFAULT_LIST, PERMISSIONS},
    wire::meta::{NewInode, UMASK_SHIFT},
};

use super::{
    Step, StorageError, Tables,
    rows::Inode,
    tables::{Result, key},
    xattr,
};

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER_LENGTH: usize = 4;
const ENTRY_LENGTH: usize = 8;
/// Entries of one list.
const ENTRIES_MAX: usize = 4096;
/// The id of entries that name nobody.
const NOBODY: u32 = u32::MAX;

/// What a new inode gets from the lists of its directory.
#[derive(Debug)]
pub(super) struct Inherited {
    /// With the flags that go with the lists.
    pub mode: u32,
    access: Option<Acl>,
    default: Option<Vec<u8>>,
}

impl Inherited {
    pub(super) fn store(&self, tables: &mut Tables<'_>, ino: Ino) -> Result<()> {
        if let Some(access) = &self.access {
            tables.put_tree(&key::xattr(ino, ACCESS), &access.encode())?;
        }
        if let Some(default) = &self.default {
            tables.put_tree(&key::xattr(ino, DEFAULT), default)?;
        }
        Ok(())
    }
}

/// A default list of the directory takes the place of the maker's umask.
pub(super) fn inherited(tables: &Tables<'_>, parent: Ino, directory: &Inode, new: &NewInode) -> Step<Inherited> {
    let (asked, umask) = (new.mode & PERMISSIONS, new.mode >> UMASK_SHIFT);
    if directory.mode & HAS_DEFAULT_LIST == 0 || new.kind == Kind::Symlink {
        return Ok(Inherited { mode: asked & !umask, access: None, default: None });
    }
    let bytes = stored(tables, parent, DEFAULT)?;
    let (access, mut mode) = kept(&bytes)?.inherited(asked);
    let access = access.is_extended().then_some(access);
    let default = (new.kind == Kind::Directory).then_some(bytes);
    mode |= if access.is_some() { HAS_ACCESS_LIST } else { 0 };
    mode |= if default.is_some() { HAS_DEFAULT_LIST } else { 0 };
    Ok(Inherited { mode, access, default })
}

/// The mode has been changed: an access list says the same.
pub(super) fn follow_mode(tables: &mut Tables<'_>, ino: Ino, inode: &Inode) -> Result<()> {
    if inode.mode & HAS_ACCESS_LIST == 0 {
        return Ok(());
    }
    let acl = kept(&stored(tables, ino, ACCESS)?)?.with_mode(inode.mode);
    tables.put_tree(&key::xattr(ino, ACCESS), &acl.encode())
}

/// What setting a list makes of the inode, and what is to be stored: nothing, when a mode can say it all.
pub(super) fn set(inode: &Inode, name: &[u8], value: &[u8]) -> Result<(Inode, Option<Vec<u8>>), Refusal> {
    let acl = Acl::decode(value)?;
    let mut inode = inode.clone();
    if name == DEFAULT {
        if !inode.is_directory() {
            return Err(Refusal::NotDirectory);
        }
        inode.mode |= HAS_DEFAULT_LIST;
        return Ok((inode, Some(acl.encode())));
    }
    inode.mode = (inode.mode & !(0o777 | HAS_ACCESS_LIST)) | acl.mode();
    if !acl.is_extended() {
        return Ok((inode, None));
    }
    inode.mode |= HAS_ACCESS_LIST;
    Ok((inode, Some(acl.encode())))
}

fn stored(tables: &Tables<'_>, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
    xattr::value(tables, ino, name)?
        .ok_or_else(|| StorageError::Damaged(format!("inode {ino} has a flag for a list that is not there")))
}

fn kept(bytes: &[u8]) -> Result<Acl> {
    Acl::decode(bytes).map_err(|_| StorageError::Damaged("a list of permissions is malformed".into()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Owner,
    User,
    OwningGroup,
    Group,
    Mask,
    Other,
}

impl Tag {
    fn of(number: u16) -> Option<Self> {
        Some(match number {
            0x01 => Self::Owner,
            0x02 => Self::User,
            0x04 => Self::OwningGroup,
            0x08 => Self::Group,
            0x10 => Self::Mask,
            0x20 => Self::Other,
            _ => return None,
        })
    }

    fn number(self) -> u16 {
        match self {
            Self::Owner => 0x01,
            Self::User => 0x02,
            Self::OwningGroup => 0x04,
            Self::Group => 0x08,
            Self::Mask => 0x10,
            Self::Other => 0x20,
        }
    }

    fn names_somebody(self) -> bool {
        matches!(self, Self::User | Self::Group)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    /// 0..=7.
    permissions: u16,
    id: u32,
}

/// A list that is valid: one entry each for owner, owning group and others, a mask if anybody is named, nobody twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// Refused `Invalid` when it is not a list that the kernel could obey.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let (version, entries) = bytes.split_first_chunk::<HEADER_LENGTH>().ok_or(Refusal::Invalid)?;
        if u32::from_le_bytes(*version) != VERSION
            || !entries.len().is_multiple_of(ENTRY_LENGTH)
            || entries.len() / ENTRY_LENGTH > ENTRIES_MAX
        {
            return Err(Refusal::Invalid);
        }
        let entries = entries.chunks_exact(ENTRY_LENGTH).map(decode_entry).collect::<Result<Vec<_>, _>>()?;
        let acl = Self(entries);
        acl.check()?;
        Ok(acl)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.tag.number().to_le_bytes());
            bytes.extend_from_slice(&entry.permissions.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    fn check(&self) -> Result<(), Refusal> {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let ordered = self.0.windows(2).all(|pair| {
            let key = |entry: &Entry| (entry.tag, if entry.tag.names_somebody() { entry.id } else { 0 });
            key(&pair[0]) < key(&pair[1])
        });
        let named = count(Tag::User) + count(Tag::Group) > 0;
        let whole = [Tag::Owner, Tag::OwningGroup, Tag::Other].into_iter().all(|tag| count(tag) == 1);
        let masked = count(Tag::Mask) == 1 || (count(Tag::Mask) == 0 && !named);
        if ordered && whole && masked { Ok(()) } else { Err(Refusal::Invalid) }
    }

    /// Does it say more than a mode can?
    pub fn is_extended(&self) -> bool {
        self.0.iter().any(|entry| entry.tag.names_somebody() || entry.tag == Tag::Mask)
    }

    /// The permission bits of a mode that says the same, as far as a mode can: the group's are the mask's, if there is one.
    pub fn mode(&self) -> u32 {
        self.permissions(Tag::Owner) << 6 | self.permissions(self.group_class()) << 3 | self.permissions(Tag::Other)
    }

    /// As chmod(2) changes it: `mode`'s bits become those of owner, group class and others.
    #[must_use]
    pub fn with_mode(mut self, mode: u32) -> Self {
        let group = self.group_class();
        for entry in &mut self.0 {
            match entry.tag {
                Tag::Owner => entry.permissions = bits(mode >> 6),
                Tag::Other => entry.permissions = bits(mode),
                tag if tag == group => entry.permissions = bits(mode >> 3),
                _ => {}
            }
        }
        self
    }

    /// As a new inode inherits it from a directory's default list: limited by what the maker asked for. Returns the
    /// list, and the mode that goes with it.
    #[must_use]
    pub fn inherited(self, asked: u32) -> (Self, u32) {
        let limited = self.mode() & asked;
        let acl = self.with_mode(limited);
        (acl, (asked & !0o777) | limited)
    }

    fn group_class(&self) -> Tag {
        if self.0.iter().any(|entry| entry.tag == Tag::Mask) { Tag::Mask } else { Tag::OwningGroup }
    }

    fn permissions(&self, tag: Tag) -> u32 {
        self.0.iter().find(|entry| entry.tag == tag).map_or(0, |entry| u32::from(entry.permissions))
    }
}

fn bits(mode: u32) -> u16 {
    (mode & 7) as u16
}

fn decode_entry(bytes: &[u8]) -> Result<Entry, Refusal> {
    let [a, b, c, d, e, f, g, h] = *bytes else { return Err(Refusal::Invalid) };
    let tag = Tag::of(u16::from_le_bytes([a, b])).ok_or(Refusal::Invalid)?;
    let permissions = u16::from_le_bytes([c, d]);
    let id = u32::from_le_bytes([e, f, g, h]);
    match tag.names_somebody() {
        _ if permissions > 7 => Err(Refusal::Invalid),
        true if id == NOBODY => Err(Refusal::Invalid),
        true => Ok(Entry { tag, permissions, id }),
        false => Ok(Entry { tag, permissions, id: NOBODY }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `u::rwx u:7:r-- g::r-x m::rwx o::---`, in getfacl's words.
    fn acl(text: &str) -> Result<Acl, Refusal> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for word in text.split_whitespace() {
            let parts: Vec<&str> = word.split(':').collect();
            let [kind, id, permissions] = parts[..] else { panic!("{word}") };
            let tag: u16 = match (kind, id) {
                ("u", "") => 0x01,
                ("u", _) => 0x02,
                ("g", "") => 0x04,
                ("g", _) => 0x08,
                ("m", _) => 0x10,
                ("o", _) => 0x20,
                _ => panic!("{word}"),
            };
            let bit = |letter, value: u16| if permissions.contains(letter) { value } else { 0 };
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&(bit('r', 4) | bit('w', 2) | bit('x', 1)).to_le_bytes());
            bytes.extend_from_slice(&id.parse().unwrap_or(NOBODY).to_le_bytes());
        }
        Acl::decode(&bytes)
    }

    #[test]
    fn only_lists_that_the_kernel_could_obey_are_valid() {
        for (text, valid) in [
            ("u::rwx g::r-x o::---", true),
            ("u::rwx u:7:r-- g::r-x m::rwx o::---", true),
            ("u::rwx u:7:r-- u:8:rw- g::r-x g:3:--- m::rwx o::---", true),
            ("u::rwx g::r-x m::r-- o::---", true),
            ("", false),
            ("u::rwx g::r-x", false),
            ("u::rwx u:7:r-- g::r-x o::---", false),
            ("u::rwx u:7:r-- u:7:rw- g::r-x m::rwx o::---", false),
            ("u::rwx u:8:r-- u:7:rw- g::r-x m::rwx o::---", false),
            ("u::rwx u::rwx g::r-x o::---", false),
            ("g::r-x u::rwx o::---", false),
        ] {
            assert_eq!(acl(text).is_ok(), valid, "{text}");
        }
        for bytes in [&b""[..], b"\x02\0\0", b"\x01\0\0\0", b"\x02\0\0\0x"] {
            assert_eq!(Acl::decode(bytes), Err(Refusal::Invalid), "{bytes:?}");
        }
    }

    #[test]
    fn a_list_and_a_mode_say_the_same() {
        let plain = acl("u::rw- g::r-- o::---").unwrap();
        assert_eq!((plain.mode(), plain.is_extended()), (0o640, false));
        let extended = acl("u::rwx u:7:rw- g::r-- m::rw- o::r--").unwrap();
        assert_eq!((extended.mode(), extended.is_extended()), (0o764, true));
        assert_eq!(extended.with_mode(0o4751), acl("u::rwx u:7:rw- g::r-- m::r-x o::--x").unwrap());
        assert_eq!(plain.with_mode(0o751), acl("u::rwx g::r-x o::--x").unwrap());
    }

    #[test]
    fn what_is_inherited_is_limited_by_what_was_asked_for() {
        let default = acl("u::rwx u:7:rwx g::r-x m::rwx o::r-x").unwrap();
        let (file, mode) = default.clone().inherited(0o644);
        assert_eq!((file, mode), (acl("u::rw- u:7:rwx g::r-x m::r-- o::r--").unwrap(), 0o644));
        let (_, mode) = default.inherited(0o2777);
        assert_eq!(mode, 0o2775);
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_refused_or_come_back_as_they_were(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(acl) = Acl::decode(&bytes) {
                prop_assert_eq!(Acl::decode(&acl.encode()), Ok(acl));
            }
        }
    }
}
