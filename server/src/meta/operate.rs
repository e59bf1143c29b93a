//! What an operator wants of storage servers: what speaks against it, and what is to be said about it.

use holdfast_common::{
    ServerId,
    cluster::Standing,
    enough_replicas,
    wire::meta::{ServerStatus, Severity},
};
use std::time::Duration;

use super::{
    cluster::Cluster,
    core::Core,
    journal::Note,
    state::{StorageError, blocks, holdings},
};

/// Blocks that are looked at in one step.
const SURVEY_PAGE: usize = 4096;
/// An operator waits for it.
const SURVEY_MAX: Duration = Duration::from_secs(2);

/// What the blocks of a server need of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Blocks of which no other server that is there has a copy.
    pub only_here: u64,
    /// The most copies that one of its blocks is to have; 0: it has none.
    pub most_wanted: usize,
}

/// Looks at all that a server is on record for, as far as a few seconds allow. Hashes are spread evenly: what is met first stands for all.
pub fn survey(core: &Core, server: ServerId) -> Result<Survey, StorageError> {
    let until = core.clock.monotonic() + SURVEY_MAX;
    let there = core.cluster.lock().there();
    let rows = core.store.view()?;
    let mut survey = Survey::default();
    let mut after = None;
    loop {
        let page = holdings::held_after(&*rows, server, after, SURVEY_PAGE)?;
        for block in &page.blocks {
            let Some(row) = blocks::block(&*rows, *block)?.filter(|row| row.refs > 0) else { continue };
            survey.most_wanted = survey.most_wanted.max(row.wanted);
            let elsewhere = row.holders.iter().any(|holder| *holder != server && there.contains(holder));
            survey.only_here += u64::from(!elsewhere);
        }
        after = page.next;
        if after.is_none() || core.clock.monotonic() > until {
            return Ok(survey);
        }
    }
}

/// Why a server should not have this standing now: in sentences for the operator; empty if nothing speaks against it.
pub fn objections(cluster: &Cluster, server: ServerId, standing: Standing, survey: &Survey) -> Vec<String> {
    let all = cluster.status(Duration::MAX);
    let Some(this) = all.iter().find(|status| status.id == server) else { return Vec::new() };
    let others: Vec<&ServerStatus> = all.iter().filter(|status| status.id != server).collect();
    let emptying = || against_emptying(this, &others, cluster.replicas().max(survey.most_wanted));
    match standing {
        Standing::Serving | Standing::Removed => Vec::new(),
        Standing::Draining => emptying(),
        Standing::Leaving => [emptying(), against_loss(this, survey)].concat(),
        Standing::Maintenance { .. } => against_absence(&others, cluster.replicas(), survey),
    }
}

/// What a server that is down has alone is lost when it is removed.
fn against_loss(this: &ServerStatus, survey: &Survey) -> Vec<String> {
    let is_away = !this.state.is_up();
    let sentence = |count| format!("it is away, and {count} blocks have no copy on another server that is there");
    (is_away && survey.only_here > 0).then(|| sentence(survey.only_here)).into_iter().collect()
}

fn against_emptying(this: &ServerStatus, others: &[&ServerStatus], replicas: usize) -> Vec<String> {
    let takers: Vec<_> = others.iter().filter(|it| it.state.is_up() && it.standing == Standing::Serving).collect();
    if takers.len() < replicas {
        return vec![format!(
            "{replicas} copies need {replicas} other storage servers that are up and take blocks: there are {}",
            takers.len()
        )];
    }
    let free: u64 = takers.iter().map(|it| it.load.free_bytes).sum();
    if free < this.load.stored_bytes {
        let stored = this.load.stored_bytes;
        return vec![format!("it stores {stored} bytes, and the others have room for {free}")];
    }
    Vec::new()
}

fn against_absence(others: &[&ServerStatus], replicas: usize, survey: &Survey) -> Vec<String> {
    let away = |it: &&&ServerStatus| !it.state.is_up() || matches!(it.standing, Standing::Maintenance { .. });
    let gone: Vec<String> = others.iter().filter(away).map(|it| it.id.to_string()).collect();
    let left = others.len() - gone.len();
    let mut reasons = Vec::new();
    if !gone.is_empty() {
        let gone = gone.join(", ");
        reasons.push(format!("storage server {gone} is away already: of some blocks there might be one copy left"));
    }
    if survey.only_here > 0 {
        let only_here = survey.only_here;
        reasons
            .push(format!("{only_here} blocks have no copy on another server that is there: they could not be read"));
    }
    if left < enough_replicas(replicas) {
        reasons.push(format!("{left} other storage servers are up: nothing could be written"));
    }
    reasons
}

/// Why the cluster should not keep so many copies of everything: in sentences for the operator; empty if nothing speaks against it.
pub fn objections_to_replicas(cluster: &Cluster, replicas: usize) -> Vec<String> {
    let all = cluster.status(Duration::MAX);
    let takers: Vec<_> = all.iter().filter(|it| it.state.is_up() && it.standing == Standing::Serving).collect();
    if takers.len() < replicas {
        let there = takers.len();
        return vec![format!(
            "{replicas} copies need {replicas} storage servers that are up and take blocks: there are {there}"
        )];
    }
    let stored: u64 = all.iter().map(|it| it.load.stored_bytes).sum();
    let now = cluster.replicas() as u64;
    let more = stored / now * (replicas as u64).saturating_sub(now);
    let free: u64 = takers.iter().map(|it| it.load.free_bytes).sum();
    if free < more {
        return vec![format!("the copies that are missing would take about {more} bytes, and {free} are free")];
    }
    Vec::new()
}

pub fn note_of_replicas(before: usize, replicas: usize) -> Note {
    let what = format!("{replicas} copies are to be kept of what has no number of its own; it were {before}");
    let note = Note::new(Severity::Info, "cluster", what);
    match replicas {
        1 => note.meaning("what is on a disk that fails is lost").doing("copies that are too many are deleted"),
        _ if replicas < before => note.doing("copies that are too many are deleted"),
        _ => note.doing("copies that are missing are made"),
    }
}

pub fn note(server: ServerId, standing: Standing) -> Note {
    let place = format!("storage server {server}");
    match standing {
        Standing::Serving => Note::new(Severity::Info, place, "serves as any other, as the operator wants"),
        Standing::Draining => Note::new(Severity::Info, place, "is to be emptied, as the operator wants")
            .doing("each of its blocks gets copies elsewhere, and is deleted here then"),
        Standing::Leaving => Note::new(Severity::Info, place, "is to leave, as the operator wants")
            .doing("each of its blocks gets copies elsewhere; when it is empty it is removed"),
        Standing::Maintenance { until } => Note::new(
            Severity::Info,
            place,
            format!("may be away until {} s after 1970, as the operator wants", until.secs),
        )
        .meaning("what is written meanwhile has copies elsewhere")
        .doing("nothing is copied for its absence"),
        Standing::Removed => Note::new(Severity::Info, place, "is removed, as the operator wants"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_common::{BootId, cluster::ServerState, limits::REPLICAS, wire::meta::StorageLoad};

    fn server(id: u32, state: ServerState, standing: Standing, free_bytes: u64) -> ServerStatus {
        ServerStatus {
            id: ServerId(id),
            address: ([127, 0, 0, 1], 7).into(),
            zone: String::new(),
            state,
            weight: 1,
            silent_ms: 0,
            boot: BootId(1),
            standing,
            left: None,
            load: StorageLoad { free_bytes, stored_bytes: 100, ..StorageLoad::default() },
            since_ms: 0,
            reason: String::new(),
            hindered: String::new(),
        }
    }

    #[test]
    fn a_server_is_emptied_only_if_its_copies_have_somewhere_to_go() {
        let up = |id, free| server(id, ServerState::Up, Standing::Serving, free);
        let this = up(1, 0);
        let against = |others: &[ServerStatus]| against_emptying(&this, &others.iter().collect::<Vec<_>>(), REPLICAS);
        assert!(against(&[up(2, 50), up(3, 50), up(4, 50)]).is_empty());
        assert!(against(&[up(2, 50), up(3, 50)])[0].contains("there are 2"));
        assert!(against(&[up(2, 33), up(3, 33), up(4, 33)])[0].contains("room for 99"));
        let away = server(4, ServerState::Down, Standing::Serving, 50);
        let draining = server(5, ServerState::Up, Standing::Draining, 50);
        assert!(against(&[up(2, 50), up(3, 50), away, draining])[0].contains("there are 2"));
    }

    #[test]
    fn what_a_server_has_alone_keeps_it_from_being_removed_while_it_is_away() {
        let survey = |only_here| Survey { only_here, most_wanted: 3 };
        let down = server(1, ServerState::Down, Standing::Serving, 0);
        assert!(against_loss(&down, &survey(0)).is_empty());
        assert!(against_loss(&down, &survey(4))[0].contains("4 blocks have no copy"));
        let up = server(1, ServerState::Up, Standing::Serving, 0);
        assert!(against_loss(&up, &survey(4)).is_empty(), "it is copied from");
    }

    #[test]
    fn one_server_at_a_time_may_be_away() {
        let up = |id| server(id, ServerState::Up, Standing::Serving, 1);
        let sole = |only_here, others: &[ServerStatus]| {
            against_absence(&others.iter().collect::<Vec<_>>(), REPLICAS, &Survey { only_here, ..Survey::default() })
        };
        let against = |others: &[ServerStatus]| sole(0, others);
        assert_eq!(
            sole(7, &[up(2), up(3)]),
            ["7 blocks have no copy on another server that is there: they could not be read"]
        );
        assert!(against(&[up(2), up(3)]).is_empty());
        let suspect = server(4, ServerState::Suspect, Standing::Serving, 1);
        assert!(against(&[up(2), up(3), suspect])[0].contains("storage server 4 is away already"));
        assert_eq!(against(&[up(2)]), ["1 other storage servers are up: nothing could be written"]);
    }
}
