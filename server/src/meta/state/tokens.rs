//! One-time tokens: the right to one certificate.

use std::ops::ControlFlow;

use holdfast_common::{Refusal, Time, net::identity::Role};

use super::{
    Reply, Rows, Step, Tables,
    rows::TokenRow,
    tables::{Result, fetch, key, past, scan},
};

/// Tokens that can be good at one time.
const TOKENS_MAX: usize = 10_000;

pub(super) fn issue(
    tables: &mut Tables<'_>,
    secret_hash: &[u8; 32],
    role: Role,
    expires: Time,
    now: Time,
) -> Step<Reply> {
    if drop_expired(tables, now)? >= TOKENS_MAX {
        return Err(Refusal::NoSpace.into());
    }
    tables.put_state(&key::token(secret_hash), &TokenRow { role, expires, used: None }.encode())?;
    Ok(Reply::Done)
}

/// Gives the token's role the next id. The same signing request gets the same id again, so that a lost answer
/// costs no second token.
pub(super) fn redeem(tables: &mut Tables<'_>, secret_hash: &[u8; 32], csr_hash: &[u8; 32], now: Time) -> Step<Reply> {
    let row_key = key::token(secret_hash);
    let token = fetch(tables.state(), &row_key, TokenRow::decode)?.ok_or(Refusal::BadToken)?;
    if token.expires <= now {
        return Err(Refusal::BadToken.into());
    }
    let id = match token.used {
        Some((csr, id)) if csr == *csr_hash => id,
        Some(_) => return Err(Refusal::BadToken.into()),
        None => next_id(tables, token.role),
    };
    tables.put_state(&row_key, &TokenRow { used: Some((*csr_hash, id)), ..token }.encode())?;
    Ok(Reply::Enrolled { role: token.role, id })
}

fn next_id(tables: &mut Tables<'_>, role: Role) -> u32 {
    let next = &mut tables.counters.node_next[usize::from(key::role(role))];
    *next += 1;
    *next - 1
}

/// Returns how many are left.
fn drop_expired(tables: &mut Tables<'_>, now: Time) -> Result<usize> {
    let prefix = [key::TOKEN];
    let (mut good, mut expired) = (0, Vec::new());
    scan(tables.state(), &prefix, &past(&prefix), |key, row| {
        match TokenRow::decode(row)?.expires > now {
            true => good += 1,
            false => expired.push(key.to_vec()),
        }
        Ok(ControlFlow::Continue(()))
    })?;
    expired.iter().try_for_each(|key| tables.remove_state(key))?;
    Ok(good)
}
