//! What goes wrong.

use super::*;

/// Suspected, down, replaced, and time to begin with it.
const GIVEN_UP_AFTER: Duration = Duration::from_millis(1600);
/// Seconds, either way.
const CLOCK_JUMP_MAX: i64 = 86_400;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    StorageDies,
    /// Long enough to be given up, and back with all that it had.
    StorageIsGivenUp,
    MetaDies,
    Partition,
    BadNetwork,
    OtherReplicas,
    ClockJumps,
    DiskIsFull,
    /// The one that turns bits, by an empty one: what it held is elsewhere.
    DiskIsReplaced,
    SeveralLosePower,
    BitsTurn,
    /// One call fails, and what was not synced is lost.
    DiskFails,
    /// An operator has a server emptied for a while, or gives it leave.
    Orders,
}

/// How often each is drawn, by which no copy gets lost.
const HONEST: [(Fault, u32); 9] = [
    (Fault::StorageDies, 2),
    (Fault::StorageIsGivenUp, 1),
    (Fault::MetaDies, 2),
    (Fault::Partition, 3),
    (Fault::BadNetwork, 2),
    (Fault::OtherReplicas, 1),
    (Fault::ClockJumps, 1),
    (Fault::DiskIsFull, 1),
    (Fault::Orders, 1),
];
/// And by which some do.
const DISHONEST: [(Fault, u32); 4] =
    [(Fault::DiskIsReplaced, 1), (Fault::SeveralLosePower, 7), (Fault::BitsTurn, 4), (Fault::DiskFails, 2)];

/// Of faults.
pub(super) const KINDS: usize = HONEST.len() + DISHONEST.len();

impl Fault {
    fn draw(random: &mut StdRng, honest: bool) -> Self {
        let dishonest = if honest { &[][..] } else { &DISHONEST[..] };
        let all: Vec<Self> = HONEST
            .iter()
            .chain(dishonest)
            .flat_map(|(fault, times)| std::iter::repeat_n(*fault, usize::try_from(*times).expect("few")))
            .collect();
        all[random.random_range(0..all.len())]
    }
}

/// Where a fault strikes, how long it lasts, and whether machines that stop lose their power.
struct Stroke<'a> {
    machines: &'a Arc<Mutex<Machines>>,
    random: &'a mut StdRng,
    victim: u32,
    /// One disk turns bits, and no other: of three copies two are as they should be.
    rotten: u32,
    long: Duration,
    power: Option<u64>,
    honest: bool,
}

/// One thing, to its end; what it leaves to be mended may still be when the next comes.
pub(super) async fn spoil(machines: &Arc<Mutex<Machines>>, admin: &Host, random: &mut StdRng, rotten: u32) {
    let honest = machines.lock().honest;
    let fault = Fault::draw(random, honest);
    let victim = random.random_range(STORAGE);
    let long = Duration::from_millis(random.random_range(20..700));
    let power = random.random::<bool>().then(|| random.random());
    let stroke = Stroke { machines, random, victim, rotten, long, power, honest };
    match fault {
        Fault::StorageDies => stroke.storage_dies(Duration::ZERO).await,
        Fault::StorageIsGivenUp => {
            let victim = stroke.may_be_given_up();
            Stroke { victim, ..stroke }.storage_dies(GIVEN_UP_AFTER).await;
        }
        Fault::MetaDies => stroke.meta_dies().await,
        Fault::Partition => stroke.partition().await,
        Fault::BadNetwork => stroke.bad_network().await,
        // Refused while servers are away, and lost now and then. Two at least: one may be on the rotten disk.
        Fault::OtherReplicas => drop(set_replicas(admin, stroke.random.random_range(2..=4)).await),
        Fault::ClockJumps => {
            let seconds = stroke.random.random_range(-CLOCK_JUMP_MAX..=CLOCK_JUMP_MAX);
            machines.lock().clock.jump(seconds);
        }
        Fault::DiskIsFull => stroke.disk_is_full().await,
        Fault::DiskIsReplaced => stroke.disk_is_replaced().await,
        Fault::SeveralLosePower => stroke.several_lose_power().await,
        Fault::BitsTurn => stroke.bits_turn(),
        Fault::DiskFails => stroke.disk_fails().await,
        Fault::Orders => stroke.get_orders(admin).await,
    }
    *machines.lock().faults.entry(format!("{fault:?}")).or_default() += 1;
}

impl Stroke<'_> {
    /// Of two copies of a block one may be on the rotten disk: where bits turn, no other server may be away for so long that the other copy is off the record, or whoever
    /// reads the block is told, as he has to be, that no good copy is known.
    fn may_be_given_up(&self) -> u32 {
        if self.honest { self.victim } else { self.rotten }
    }

    async fn storage_dies(self, longer: Duration) {
        let power = self.power.filter(|_| !self.honest);
        let disk = self.machines.lock().stop_storage(self.victim, power);
        tokio::time::sleep(self.long + longer).await;
        self.machines.lock().start_storage(self.victim, disk);
    }

    async fn meta_dies(self) {
        let disk = self.machines.lock().stop_meta(self.power);
        tokio::time::sleep(self.long / 4).await;
        self.machines.lock().start_meta(disk);
    }

    /// Between two, both ways or one of them.
    async fn partition(self) {
        let given_up = self.may_be_given_up();
        let random = self.random;
        let one = match random.random_range(0..5) {
            0 | 1 => mount(random.random_range(1..=MOUNTS)),
            2 | 3 => META,
            _ => storage(self.victim % 4 + 1),
        };
        let other = match one {
            META => storage(given_up),
            _ if one.role == Role::Client && random.random() => META,
            _ => storage(self.victim),
        };
        let mut cut = vec![(one, other), (other, one)];
        if random.random_range(0..3) > 0 {
            cut.remove(random.random_range(0..2));
        }
        let long = self.long * random.random_range(1..6);
        for_a_while(self.machines, long, |weather| weather.cut.extend(cut)).await;
    }

    async fn bad_network(self) {
        let random = self.random;
        let [lost, repeated] = [(); 2].map(|()| random.random_range(0..10));
        let late = random.random_range(0..60);
        let [calls_lost, answers_lost, calls_twice, calls_late] = [(); 4].map(|()| random.random_range(0..8));
        let cut = BTreeSet::new();
        let bad = Weather { lost, repeated, late, calls_lost, answers_lost, calls_twice, calls_late, cut };
        for_a_while(self.machines, self.long, |weather| *weather = bad).await;
    }

    async fn disk_is_full(self) {
        let disk = self.machines.lock().storage[&self.victim].disk.clone();
        disk.fill(true);
        tokio::time::sleep(self.long).await;
        disk.fill(false);
        self.machines.lock().restart_failed();
    }

    async fn disk_fails(self) {
        let disk = self.machines.lock().storage[&self.victim].disk.clone();
        disk.strike(self.random.random_range(1..40), Trouble::OneError);
        tokio::time::sleep(self.long).await;
        // It did, or it will not.
        disk.strike(u64::from(u32::MAX), Trouble::OneError);
        self.machines.lock().restart_failed();
    }

    async fn get_orders(self, admin: &Host) {
        let server = self.may_be_given_up();
        let until = Time { secs: i64::MAX, nanos: 0 };
        let standing = if self.random.random() { Standing::Draining } else { Standing::Maintenance { until } };
        if stand(admin, server, standing).await.is_ok() {
            tokio::time::sleep(self.long * self.random.random_range(1..6)).await;
        }
        // Again at the end of the history, if nobody hears it.
        drop(stand(admin, server, Standing::Serving).await);
    }

    async fn disk_is_replaced(self) {
        self.machines.lock().stop_storage(self.rotten, None);
        tokio::time::sleep(self.long).await;
        self.machines.lock().start_storage(self.rotten, SimDisk::new());
    }

    /// Storage servers, all or all but one, and perhaps the metadata server: those who use them go on.
    async fn several_lose_power(self) {
        let seed: u64 = self.random.random();
        let with_meta = self.random.random::<bool>();
        let spared = self.random.random::<bool>().then_some(self.victim);
        let struck: Vec<u32> = STORAGE.filter(|id| Some(*id) != spared).collect();
        let (disks, meta) = {
            let mut machines = self.machines.lock();
            let meta = with_meta.then(|| machines.stop_meta(Some(seed)));
            let stop = |id: u32| (id, machines.stop_storage(id, Some(seed.wrapping_add(id.into()))));
            (struck.into_iter().map(stop).collect::<Vec<_>>(), meta)
        };
        tokio::time::sleep(self.long / 2).await;
        let mut machines = self.machines.lock();
        disks.into_iter().for_each(|(id, disk)| machines.start_storage(id, disk));
        meta.into_iter().for_each(|disk| machines.start_meta(disk));
    }

    fn bits_turn(self) {
        let disk = self.machines.lock().storage[&self.rotten].disk.clone();
        for path in disk.list(&Path::new(DIRECTORY).join("segments")).unwrap_or_default() {
            let length = disk.open(&path, false).and_then(|file| file.length()).unwrap_or(0);
            if length > 4096 {
                // A segment may go at any time.
                drop(disk.flip_bit(&path, self.random.random_range(100..length)));
            }
        }
    }
}

async fn for_a_while(machines: &Arc<Mutex<Machines>>, long: Duration, change: impl FnOnce(&mut Weather)) {
    let ether = machines.lock().ether.clone();
    ether.change(change);
    tokio::time::sleep(long).await;
    ether.clear_up();
}
