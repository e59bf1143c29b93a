//! Mounts, and programs that know what must be there.

use super::*;

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const FILES_MAX: usize = 8;
/// What nobody names is condemned and ordered to be deleted by then, and orders that are late are still under way.
const DELETED_AFTER: Duration = Duration::from_secs(4);

/// A mount, and what it knows that must be there.
pub(super) struct User {
    pub(super) mount: Mount,
    pub(super) directory: Ino,
    pub(super) files: Files,
    /// What there was since all of it was made durable, step by step, at the end of a history.
    pub(super) states: Option<Vec<Files>>,
    /// What was deleted, and when: storing it again at the right moment meets the orders to delete it.
    pub(super) deleted: VecDeque<(Instant, Vec<u8>)>,
    pub(super) random: StdRng,
    pub(super) made: u64,
}

pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// A mount, until it is dropped.
pub(super) struct Mount {
    pub(super) fs: Arc<Fs>,
    pub(super) host: Arc<Host>,
    pub(super) duties: tokio::task::JoinHandle<()>,
}

impl Mount {
    pub(super) async fn new(ether: &Ether, id: u32) -> Result<Self, Wrong> {
        let options = FsOptions {
            cache_bytes: 1 << 20,
            dirty_bytes: 8 << 20,
            io_timeout: PATIENCE,
            connect_timeout: PATIENCE,
            relay: Relaying::Auto,
            access_times: AccessTimes::default(),
        };
        let name = MountName { host: "sim".into(), mountpoint: format!("/mnt-{id}") };
        let host = ether.host(mount(id));
        let peers = Arc::clone(&host) as Arc<dyn Peers>;
        let clock = Arc::new(SystemClock::default());
        let fs = Fs::connect(peers, Ether::endpoint(META), name, options, clock).await;
        let fs = fs.map_err(|error| format!("a mount does not connect: {error}"))?;
        let duties = tokio::spawn(Duties::run(Arc::clone(&fs)));
        Ok(Self { fs, host, duties })
    }

    /// Its machine loses its power.
    pub(super) fn die(&self) {
        self.duties.abort();
        self.host.die();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.die();
    }
}

pub(super) fn wrong(what: &str, name: &str, result: Errno) -> Wrong {
    format!("{what} of {name}: errno {}", result.0)
}

impl User {
    pub(super) async fn new(ether: &Ether, id: u32, seed: u64) -> Result<Self, Wrong> {
        let mount = Mount::new(ether, id).await?;
        let request = MakeRequest { kind: Kind::Directory, mode: 0o755, rdev: 0, target: Vec::new() };
        let name = format!("dir-{id}");
        let made = mount.fs.make(CALLER, Ino::ROOT, name.as_bytes(), request).await;
        let directory = made.map_err(|error| wrong("mkdir", &name, error))?.ino;
        let random = StdRng::seed_from_u64(seed * 100 + u64::from(id));
        Ok(Self { mount, directory, files: Files::new(), states: None, deleted: VecDeque::new(), random, made: 0 })
    }

    pub(super) fn pick(&mut self) -> Option<String> {
        let count = self.files.len();
        (count > 0).then(|| self.random.random_range(0..count)).and_then(|n| self.files.keys().nth(n).cloned())
    }

    /// Mostly of few different ones, so that what is deleted is stored again a moment later.
    pub(super) fn content(&mut self) -> Vec<u8> {
        let (which, length) = (self.random.random_range(0..7), [700, 5000, 40_000][self.random.random_range(0..3)]);
        match which {
            0..3 => random_bytes(which, length),
            3..5 => self.deleted_content().unwrap_or_else(|| self.new_content()),
            _ => self.new_content(),
        }
    }

    /// That servers are about to delete.
    pub(super) fn deleted_content(&mut self) -> Option<Vec<u8>> {
        let is_due = |(at, _): &(Instant, _)| at.elapsed() >= DELETED_AFTER;
        self.deleted.pop_front_if(|deleted| is_due(deleted)).map(|(_, content)| content)
    }

    /// That no server can have already.
    pub(super) fn new_content(&mut self) -> Vec<u8> {
        random_bytes(self.random.random(), 5000)
    }

    pub(super) async fn step(&mut self) -> Result<(), Wrong> {
        let step = async {
            match self.random.random_range(0..100) {
                0..35 => self.create().await,
                35..50 => self.overwrite().await,
                50..70 => self.read().await,
                70..80 => self.rename().await,
                80..87 => self.truncate().await,
                _ => self.delete().await,
            }
        };
        let done = tokio::time::timeout(2 * PATIENCE, step).await;
        done.unwrap_or_else(|_| Err("an operation does not end".to_owned()))?;
        self.note(None);
        if self.files.len() > FILES_MAX {
            self.delete().await?;
            self.note(None);
        }
        Ok(())
    }

    /// With something that only this makes durable.
    pub(super) async fn make_all_durable(&mut self) -> Result<(), Wrong> {
        let content = self.new_content();
        self.create_file(content, false).await?;
        self.mount.fs.sync_all(true).await.map_err(|error| wrong("sync", "everything", error))?;
        self.states = Some(vec![self.files.clone()]);
        Ok(())
    }

    /// Remembers what there is, and `empty`, which is just made.
    pub(super) fn note(&mut self, empty: Option<&str>) {
        if let Some(states) = &mut self.states {
            let mut state = self.files.clone();
            state.extend(empty.map(|name| (name.to_owned(), Vec::new())));
            states.push(state);
        }
    }

    pub(super) async fn written(
        &self,
        attr: Attr,
        handle: FileHandle,
        at: u64,
        content: &[u8],
        sync: bool,
    ) -> FsResult<()> {
        let content = Bytes::copy_from_slice(content);
        self.mount.fs.write(CALLER, attr.ino, handle, at, content).await?;
        if sync {
            self.mount.fs.fsync(attr.ino, handle, false).await?
        } else {
            self.mount.fs.flush(attr.ino, handle, 0).await?
        }
        self.mount.fs.release(attr.ino, handle).await;
        Ok(())
    }

    /// Now and then; at the end, never.
    pub(super) fn wants_sync(&mut self) -> bool {
        self.states.is_none() && self.random.random()
    }

    pub(super) async fn create(&mut self) -> Result<(), Wrong> {
        let (content, sync) = (self.content(), self.wants_sync());
        self.create_file(content, sync).await
    }

    pub(super) async fn create_file(&mut self, content: Vec<u8>, sync: bool) -> Result<(), Wrong> {
        self.made += 1;
        let name = format!("file-{}", self.made);
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let made = self.mount.fs.create(CALLER, self.directory, name.as_bytes(), 0o644, flags).await;
        let (attr, opened) = made.map_err(|error| wrong("create", &name, error))?;
        self.note(Some(&name));
        let written = self.written(attr, opened.handle, 0, &content, sync).await;
        written.map_err(|error| wrong("write", &name, error))?;
        self.files.insert(name, content);
        Ok(())
    }

    pub(super) async fn overwrite(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let (new, sync) = (self.content(), self.wants_sync());
        let at = self.random.random_range(0..=self.files[&name].len());
        let written = async {
            let attr = self.mount.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let opened = self.mount.fs.open(CALLER, attr.ino, libc::O_RDWR).await?;
            self.written(attr, opened.handle, at as u64, &new, sync).await
        };
        written.await.map_err(|error| wrong("overwrite", &name, error))?;
        let content = self.files.get_mut(&name).expect("picked");
        content.resize(content.len().max(at + new.len()), 0);
        content[at..at + new.len()].copy_from_slice(&new);
        Ok(())
    }

    pub(super) async fn read(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        check_file(&self.mount.fs, self.directory, &name, &self.files[&name]).await
    }

    pub(super) async fn rename(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        self.made += 1;
        let new = format!("file-{}", self.made);
        let directory = self.directory;
        let renamed =
            self.mount.fs.rename(directory, name.as_bytes(), directory, new.as_bytes(), RenameMode::Replace).await;
        renamed.map_err(|error| wrong("rename", &name, error))?;
        let content = self.files.remove(&name).expect("picked");
        self.files.insert(new, content);
        Ok(())
    }

    pub(super) async fn truncate(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let length = self.random.random_range(0..=self.files[&name].len());
        let cut = async {
            let attr = self.mount.fs.lookup(self.directory, name.as_bytes()).await?.attr;
            let set = SetAttr { size: Some(length as u64), ..SetAttr::default() };
            self.mount.fs.setattr(CALLER, attr.ino, set).await
        };
        cut.await.map_err(|error| wrong("truncate", &name, error))?;
        self.files.get_mut(&name).expect("picked").truncate(length);
        Ok(())
    }

    pub(super) async fn delete(&mut self) -> Result<(), Wrong> {
        let Some(name) = self.pick() else { return Ok(()) };
        let gone = self.mount.fs.unlink(self.directory, name.as_bytes()).await;
        gone.map_err(|error| wrong("unlink", &name, error))?;
        let content = self.files.remove(&name).expect("picked");
        self.deleted.push_back((Instant::now(), content));
        Ok(())
    }
}

pub(super) async fn read_file(fs: &Fs, directory: Ino, name: &str) -> FsResult<Bytes> {
    let attr = fs.lookup(directory, name.as_bytes()).await?.attr;
    let opened = fs.open(CALLER, attr.ino, libc::O_RDONLY).await?;
    let bytes = fs.read(attr.ino, opened.handle, 0, 1 << 20).await;
    fs.release(attr.ino, opened.handle).await;
    bytes
}

pub(super) async fn check_file(fs: &Fs, directory: Ino, name: &str, content: &[u8]) -> Result<(), Wrong> {
    let found = read_file(fs, directory, name).await.map_err(|error| wrong("read", name, error))?;
    if found == content {
        Ok(())
    } else {
        Err(format!("{name} has wrong bytes: {} for {}", found.len(), content.len()))
    }
}
