use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use holdfast_common::{
    config::{ConfigError, StorageOptions},
    disk::{DiskFile, RealDisk, Space},
    net::identity::Role,
    wire::{
        meta::StorageNotice,
        storage::{StorageAnswer, StorageRequest},
    },
};
use tokio::sync::oneshot;

use super::*;
use crate::storage::tests::{Cluster, block, call, cluster, credentials, put_block};

/// The machine's, but that nothing under one directory can be made durable while it is `broken`.
#[derive(Debug)]
struct BadDisk {
    directory: PathBuf,
    broken: Arc<AtomicBool>,
}

#[derive(Debug)]
struct BadFile {
    file: Arc<dyn DiskFile>,
    broken: Arc<AtomicBool>,
}

impl Disk for BadDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = RealDisk.open(path, create)?;
        let broken = Arc::clone(&self.broken);
        Ok(if path.starts_with(&self.directory) { Arc::new(BadFile { file, broken }) } else { file })
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_directory(path)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.list(directory)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        RealDisk.sync_directory(directory)
    }

    fn space(&self, directory: &Path) -> io::Result<Space> {
        RealDisk.space(directory)
    }

    fn machine_boot(&self) -> io::Result<String> {
        RealDisk.machine_boot()
    }
}

impl DiskFile for BadFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_length(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        match self.broken.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => self.file.sync_data(),
        }
    }

    fn start_writeback(&self, offset: u64, length: u64) {
        self.file.start_writeback(offset, length);
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length)
    }
}

fn configs(directories: &[&Path], cluster: &Cluster) -> Result<Vec<StorageConfig>, ConfigError> {
    StorageConfig::resolve_all(StorageOptions {
        data_dir: Some(directories.iter().map(|path| path.to_path_buf()).collect()),
        listen: Some(([127, 0, 0, 1], 0).into()),
        meta: Some(cluster.meta.to_string()),
        ..StorageOptions::default()
    })
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn shared(directory: &Path, broken: &Arc<AtomicBool>) -> Shared {
    let disk = Arc::new(BadDisk { directory: directory.to_owned(), broken: Arc::clone(broken) });
    let clock = Arc::new(holdfast_common::clock::SystemClock::default());
    Shared { disk, clock, runtime, try_again_after: Duration::from_millis(200) }
}

/// Waits until exactly these servers are heard, several times in a row; returns where the last of them is.
async fn until_heard(cluster: &mut Cluster, ids: &[u32]) -> std::net::SocketAddr {
    let wanted: BTreeSet<u32> = ids.iter().copied().collect();
    loop {
        let (mut heard, mut last) = (BTreeSet::new(), None);
        for _ in 0..4 {
            let (id, notice) = cluster.heard.recv().await.expect("the metadata server is there");
            let StorageNotice::Heartbeat { address, .. } = notice else { continue };
            heard.insert(id);
            last = last.filter(|_| Some(&id) != ids.last()).or(Some(address));
        }
        if heard == wanted {
            return last.expect("four were heard");
        }
    }
}

#[tokio::test]
async fn a_data_directory_that_fails_goes_alone_and_comes_back_when_it_can() {
    let mut cluster = cluster();
    let (good, bad) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let configs = configs(&[good.path(), bad.path()], &cluster).unwrap();
    for (config, id) in configs.iter().zip([7, 8]) {
        credentials(&cluster.ca, Role::Storage, id).save(&config.tls_dir).unwrap();
    }
    let broken = Arc::new(AtomicBool::new(false));
    let (is_ready, ready) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(run_all(configs, shared(bad.path(), &broken), || is_ready.send(()).unwrap(), async {
        stopped.await.unwrap()
    }));
    ready.await.unwrap();
    let address = until_heard(&mut cluster, &[7, 8]).await;
    broken.store(true, Ordering::SeqCst);
    let block = block(1, 5000);
    let put = StorageRequest::Put { blocks: vec![put_block(&block)], durable: true };
    let answer = call(&cluster, 8, address, &put, block.bytes().clone()).await;
    assert!(answer.is_err() || answer.is_ok_and(|(reply, _)| reply.0.is_err()), "it cannot be durable");
    let address = until_heard(&mut cluster, &[7]).await;
    let (reply, _) = call(&cluster, 7, address, &put, block.bytes().clone()).await.unwrap();
    assert!(matches!(reply.0, Ok(StorageAnswer::Put { durable: true, .. })), "{reply:?}");
    broken.store(false, Ordering::SeqCst);
    let address = until_heard(&mut cluster, &[7, 8]).await;
    let (reply, _) = call(&cluster, 8, address, &put, block.bytes().clone()).await.unwrap();
    assert!(matches!(reply.0, Ok(StorageAnswer::Put { durable: true, .. })), "{reply:?}");
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    let get = StorageRequest::Get { block: block.hash(), range: None };
    assert!(call(&cluster, 8, address, &get, Bytes::new()).await.is_err(), "it has stopped");
}

#[tokio::test]
async fn one_directory_that_cannot_start_does_not_keep_the_others_and_all_of_them_end_the_daemon() {
    let mut cluster = cluster();
    let (good, gone) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let configs = configs(&[gone.path(), good.path()], &cluster).unwrap();
    let broken = Arc::new(AtomicBool::new(false));
    let all_gone =
        run_all(configs.clone(), shared(gone.path(), &broken), || panic!("nothing is ready"), std::future::pending());
    assert!(matches!(all_gone.await, Err(RunError::Credentials { .. })));
    credentials(&cluster.ca, Role::Storage, 7).save(&configs[1].tls_dir).unwrap();
    let (is_ready, ready) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let running =
        tokio::spawn(run_all(configs.clone(), shared(gone.path(), &broken), || is_ready.send(()).unwrap(), async {
            stopped.await.unwrap()
        }));
    ready.await.unwrap();
    until_heard(&mut cluster, &[7]).await;
    // Its disk is mounted, and fails later, and is mounted again: the other goes on, and they end well.
    credentials(&cluster.ca, Role::Storage, 8).save(&configs[0].tls_dir).unwrap();
    let address = until_heard(&mut cluster, &[7, 8]).await;
    broken.store(true, Ordering::SeqCst);
    let block = block(1, 5000);
    let put = StorageRequest::Put { blocks: vec![put_block(&block)], durable: true };
    drop(call(&cluster, 8, address, &put, block.bytes().clone()).await);
    until_heard(&mut cluster, &[7]).await;
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
}
