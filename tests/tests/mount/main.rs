//! Real clusters of real processes behind real mounts, hurt in every way that the promises name.

mod attributes;
mod backup;
mod behind;
mod bounded;
mod chaos;
mod daemons;
mod disks;
mod dying;
mod ends;
mod garbage;
mod identity;
mod leases;
mod locks;
mod many;
mod model;
mod mount_cli;
mod namespace;
mod operate;
mod pjdfstest;
mod posix_core;
mod repair;
mod replicas;
mod shell;
mod suites;
mod writing;
mod zones;
