//! Extended attributes.

use std::ops::ControlFlow;

use holdfast_common::{
    Ino, Refusal, Time,
    limits::{XATTR_LIST_LENGTH_MAX, XATTR_NAME_LENGTH_MAX, XATTR_VALUE_LENGTH_MAX},
    mode,
    wire::meta::{Mutated, XattrMode},
};

use super::{
    Rows, Step, Tables, acl, existing, replicas,
    rows::Inode,
    tables::{Result, fetch, key, past, scan},
};

/// File capabilities, which the kernel looks for before every write.
const CAPABILITY: &[u8] = b"security.capability";

pub(super) fn set(
    tables: &mut Tables<'_>,
    ino: Ino,
    name: &[u8],
    value: &[u8],
    how: XattrMode,
    now: Time,
) -> Step<Mutated> {
    check_name(name)?;
    if name == replicas::ATTRIBUTE {
        return replicas::set(tables, ino, value, now);
    }
    if value.len() > XATTR_VALUE_LENGTH_MAX {
        return Err(Refusal::TooLarge.into());
    }
    let inode = existing(tables, ino)?;
    let taken = fetch(tables.tree(), &key::xattr(ino, name), |_| Ok(()))?.is_some();
    match (how, taken) {
        (XattrMode::Create, true) => return Err(Refusal::Exists.into()),
        (XattrMode::Replace, false) => return Err(Refusal::NoAttribute.into()),
        _ => {}
    }
    let listed: usize = names(tables, ino)?.iter().map(|name| name.len() + 1).sum();
    if !taken && listed + name.len() + 1 > XATTR_LIST_LENGTH_MAX {
        return Err(Refusal::NoSpace.into());
    }
    let (inode, value) = match name {
        acl::ACCESS | acl::DEFAULT => acl::set(&inode, name, value)?,
        CAPABILITY => (Inode { mode: inode.mode | mode::HAS_CAPABILITY, ..inode }, Some(value.to_vec())),
        _ => (inode, Some(value.to_vec())),
    };
    match value {
        Some(value) => tables.put_tree(&key::xattr(ino, name), &value)?,
        None => tables.remove_tree(&key::xattr(ino, name))?,
    }
    tables.put_inode(ino, Inode { ctime: now, ..inode });
    Ok(Mutated::Done)
}

pub(super) fn remove(tables: &mut Tables<'_>, ino: Ino, name: &[u8], now: Time) -> Step<Mutated> {
    check_name(name)?;
    if name == replicas::ATTRIBUTE {
        return replicas::unset(tables, ino, now);
    }
    let inode = existing(tables, ino)?;
    value(tables, ino, name)?.ok_or(Refusal::NoAttribute)?;
    tables.remove_tree(&key::xattr(ino, name))?;
    tables.put_inode(ino, Inode { ctime: now, mode: inode.mode & !flag_of(name), ..inode });
    Ok(Mutated::Done)
}

fn flag_of(name: &[u8]) -> u32 {
    match name {
        acl::ACCESS => mode::HAS_ACCESS_LIST,
        acl::DEFAULT => mode::HAS_DEFAULT_LIST,
        CAPABILITY => mode::HAS_CAPABILITY,
        _ => 0,
    }
}

pub(super) fn check_name(name: &[u8]) -> Result<(), Refusal> {
    match name.len() {
        0 => Err(Refusal::Invalid),
        1..=XATTR_NAME_LENGTH_MAX if !name.contains(&0) => Ok(()),
        1..=XATTR_NAME_LENGTH_MAX => Err(Refusal::Invalid),
        _ => Err(Refusal::NameTooLong),
    }
}

pub fn value(rows: &impl Rows, ino: Ino, name: &[u8]) -> Result<Option<Vec<u8>>> {
    if name == replicas::ATTRIBUTE {
        return Ok(rows.inode(ino)?.as_ref().and_then(replicas::shown));
    }
    fetch(rows.tree(), &key::xattr(ino, name), |value| Ok(value.to_vec()))
}

/// Names in byte order: at most `XATTR_LIST_LENGTH_MAX` bytes with their NULs.
pub fn names(rows: &impl Rows, ino: Ino) -> Result<Vec<Vec<u8>>> {
    let prefix = key::family(ino, key::XATTR);
    let mut names = Vec::new();
    scan(rows.tree(), &prefix, &past(&prefix), |key, _| {
        names.push(key[prefix.len()..].to_vec());
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(names)
}
