//! One history, and what has to be true at its end.

use super::*;

/// Steps of each mount, at most, before all machines lose their power.
const LAST_STEPS: u32 = 40;

/// What happened in a history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    /// By the clock of the simulation.
    pub(crate) took: Duration,
    pub(crate) counts: Counts,
    pub(crate) faults: BTreeMap<String, u32>,
    pub(crate) sent: Vec<Sent>,
}

/// One history. `Err`: something was wrong.
pub(crate) fn history(seed: u64) -> Result<Told, Wrong> {
    simulated(seed, || async move {
        let begun = tokio::time::Instant::now();
        let ether = Ether::new(seed);
        let machines = Arc::new(Mutex::new(Machines::start(ether.clone(), seed)));
        let beating = tokio::spawn(beat(Arc::clone(&machines)));
        let admin = ether.host(NodeName { role: Role::Admin, id: 1 });
        let outcome = survive(&machines, &ether, &admin, seed).await;
        beating.abort();
        outcome.map_err(|wrong| format!("seed {seed}: {wrong}"))?;
        let faults = machines.lock().faults.clone();
        Ok(Told { took: begun.elapsed(), counts: ether.counts(), faults, sent: ether.sent() })
    })
}

async fn survive(machines: &Arc<Mutex<Machines>>, ether: &Ether, admin: &Host, seed: u64) -> Result<(), Wrong> {
    until_up(admin).await?;
    let mut users = Vec::new();
    for id in 1..=MOUNTS {
        users.push(User::new(ether, id, seed).await?);
    }
    let mut random = StdRng::seed_from_u64(seed);
    work_while_spoiled(machines, admin, &mut users, &mut random).await?;
    ether.clear_up();
    for server in STORAGE {
        until(|| stand(admin, server, Standing::Serving)).await?;
    }
    until(|| set_replicas(admin, 3)).await?;
    if machines.lock().honest {
        nothing_is_missed(admin).await?;
    }
    for user in &mut users {
        user.make_all_durable().await?;
    }
    for user in &mut users {
        // And what nothing makes durable: of that the last may be lost.
        for _ in 0..random.random_range(0..LAST_STEPS) {
            user.step().await?;
        }
    }
    lose_all_power(machines, &users, seed);
    ether.change(|weather| weather.calls_late = 0);
    until_up(admin).await?;
    let fresh = Mount::new(ether, 9).await?;
    check_everything(&fresh.fs, &users).await?;
    until_whole(admin).await
}

/// Until as many faults as a history has are over.
async fn work_while_spoiled(
    machines: &Arc<Mutex<Machines>>,
    admin: &Host,
    users: &mut [User],
    random: &mut StdRng,
) -> Result<(), Wrong> {
    let (honest, rotten) = (machines.lock().honest, random.random_range(STORAGE));
    let over = std::cell::Cell::new(false);
    let faults = async {
        for _ in 0..FAULTS {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
            spoil(machines, admin, random, rotten).await;
        }
        over.set(true);
        Ok(())
    };
    let audit = async {
        while !over.get() {
            nothing_is_violated(admin).await?;
            if honest {
                nothing_is_missed(admin).await?;
            }
            tokio::time::sleep(HEARTBEAT).await;
        }
        Ok(())
    };
    let work = users.iter_mut().map(|user| async {
        while !over.get() {
            user.step().await?;
            // Whoever waits for nothing still lets the others run.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<(), Wrong>(())
    });
    tokio::try_join!(futures_util::future::try_join_all(work), faults, audit).map(drop)
}

/// Every machine, and the mounts with theirs.
pub(super) fn lose_all_power(machines: &Arc<Mutex<Machines>>, users: &[User], seed: u64) {
    users.iter().for_each(|user| user.mount.die());
    let mut machines = machines.lock();
    let meta = machines.stop_meta(Some(seed));
    let disks: Vec<(u32, SimDisk)> =
        STORAGE.map(|id| (id, machines.stop_storage(id, Some(seed + u64::from(id))))).collect();
    disks.into_iter().for_each(|(id, disk)| machines.start_storage(id, disk));
    machines.start_meta(meta);
}

/// Each directory is as it was after all was made durable, or after one of the steps since.
pub(super) async fn check_everything(fs: &Fs, users: &[User]) -> Result<(), Wrong> {
    for user in users {
        let found = files_in(fs, user.directory).await.map_err(|wrong| format!("after a power cut: {wrong}"))?;
        let states = user.states.as_deref().unwrap_or_default();
        if !states.contains(&found) {
            let known: Vec<Vec<(&String, usize)>> = states.iter().chain([&found]).map(sizes).collect();
            return Err(format!(
                "after a power cut there is what never was; there were, and the last is there: {known:?}"
            ));
        }
    }
    Ok(())
}

pub(super) fn sizes(files: &Files) -> Vec<(&String, usize)> {
    files.iter().map(|(name, content)| (name, content.len())).collect()
}

pub(super) async fn files_in(fs: &Fs, directory: Ino) -> Result<Files, Wrong> {
    let opened = fs.opendir(directory).await.map_err(|error| wrong("opendir", "a directory", error))?;
    let page = fs.readdir(directory, opened.handle, 0, false).await.map_err(|error| wrong("readdir", "it", error))?;
    fs.releasedir(directory, opened.handle);
    let mut found = Files::new();
    for entry in page.entries.iter().filter(|entry| !entry.name.starts_with(b".")) {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let content = read_file(fs, directory, &name).await.map_err(|error| wrong("read", &name, error))?;
        found.insert(name, content.to_vec());
    }
    Ok(found)
}
