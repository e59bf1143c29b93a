#!/bin/bash
# MooseFS 3.0.117 peer: 1 master, 3 chunkservers, goal 3, mfsmount.
# usage: moosefs.sh up | down | remount | mountpoint | status | wipe
# MooseFS refuses chunkservers on 127/8, so every MooseFS process runs under
# loshim.so (loopback.c), which shows 127.0.0.x as 239.255.0.x inside it (traffic: loopback only).
set -u
P=$(dirname "$(readlink -f "$0")"); . "$P/lib.sh"
B=$BENCH_DATA/moosefs
MNT=$BENCH_DATA/mnt-moosefs
SHIM=$BENCH_DATA/bin/loshim.so
MIP=239.255.0.1            # = 127.0.0.1 on the wire
# What can be changed; the defaults are what Debian ships.
FSYNC_BEFORE_CLOSE=${MFS_FSYNC:-0}       # chunkserver HDD_FSYNC_BEFORE_CLOSE (default 0 = no fsync)
CHANGELOG_MODE=${MFS_CHANGELOG_MODE:-0}  # master CHANGELOG_SAVE_MODE (default 0 = background, no fsync; 2 = fsync each)
MOUNT_OPTS=${MFS_MOUNT_OPTS:-}           # extra mfsmount -o options, e.g. mfscachemode=YES
# ports: master 19419 (ml) 19420 (cs) 19421 (client), chunkservers 19431-19433

[ -e $SHIM ] || { mkdir -p $BENCH_DATA/bin; gcc -O2 -shared -fPIC -o $SHIM $P/loopback.c -ldl || exit 1; }

conf() {
  mkdir -p $B/etc $B/master $B/cs1 $B/cs2 $B/cs3 $B/hdd1 $B/hdd2 $B/hdd3
  [ -e $B/master/metadata.mfs ] || [ -e $B/master/metadata.mfs.back ] || cp /var/lib/mfs/metadata.mfs.empty $B/master/metadata.mfs
  cat > $B/etc/mfsmaster.cfg <<E
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = $B/master
EXPORTS_FILENAME = $B/etc/mfsexports.cfg
TOPOLOGY_FILENAME = $B/etc/mfstopology.cfg
MATOML_LISTEN_HOST = $MIP
MATOML_LISTEN_PORT = 19419
MATOCS_LISTEN_HOST = $MIP
MATOCS_LISTEN_PORT = 19420
MATOCL_LISTEN_HOST = $MIP
MATOCL_LISTEN_PORT = 19421
CHANGELOG_SAVE_MODE = $CHANGELOG_MODE
NICE_LEVEL = 0
REPLICATIONS_DELAY_INIT = 5
E
  : > $B/etc/mfstopology.cfg
  { echo "* / rw,alldirs,maproot=0,admin"; echo "* . rw"; } > $B/etc/mfsexports.cfg
  for i in 1 2 3; do
    echo "$B/hdd$i" > $B/etc/mfshdd$i.cfg
    cat > $B/etc/cs$i.cfg <<E
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = $B/cs$i
HDD_CONF_FILENAME = $B/etc/mfshdd$i.cfg
MASTER_HOST = $MIP
MASTER_PORT = 19420
BIND_HOST = 239.255.0.$((i+1))
CSSERV_LISTEN_HOST = 239.255.0.$((i+1))
CSSERV_LISTEN_PORT = $((19430+i))
HDD_FSYNC_BEFORE_CLOSE = $FSYNC_BEFORE_CLOSE
HDD_LEAVE_SPACE_DEFAULT = 256MiB
NICE_LEVEL = 0
SYSLOG_IDENT = mfschunkserver$i
E
  done
}
run() { LD_PRELOAD=$SHIM "$@"; }
ncs() { mfscli -H 127.0.0.1 -p -P 19421 -SCS 2>/dev/null | grep -c '239\.255\.0\.' ; }
# pids of OUR daemons only: read from their lock files
mpid() { pidof_file $B/master/.mfsmaster.lock mfsmaster; }
cpid() { pidof_file $B/cs$1/.mfschunkserver.lock mfschunkserver; }

mnt() {
  mkdir -p $MNT
  run mfsmount $MNT -H $MIP -P 19421 -o mfsnice=0${MOUNT_OPTS:+,$MOUNT_OPTS} >> $B/log/up.log 2>&1 || { tail -5 $B/log/up.log; return 1; }
  for t in $(seq 20); do mountpoint -q $MNT && break; sleep 0.25; done
}
remount() { umnt $MNT; mnt; }
up() {
  if mountpoint -q $MNT; then echo "already mounted: $MNT"; return 0; fi
  conf
  mkdir -p $B/log
  mpid >/dev/null || run mfsmaster -c $B/etc/mfsmaster.cfg -a start >> $B/log/up.log 2>&1 || { tail -5 $B/log/up.log; return 1; }
  for i in 1 2 3; do
    cpid $i >/dev/null || run mfschunkserver -c $B/etc/cs$i.cfg start >> $B/log/up.log 2>&1 || { tail -5 $B/log/up.log; return 1; }
  done
  for t in $(seq 60); do [ "$(ncs)" -ge 3 ] && break; sleep 0.5; done
  [ "$(ncs)" -ge 3 ] || { echo "chunkservers did not register"; mfscli -H 127.0.0.1 -P 19421 -SCS; return 1; }
  mnt || return 1
  mfssetgoal -r 3 $MNT > /dev/null
  mfssettrashtime -r 0 $MNT > /dev/null    # else unlink keeps data 24 h and fills the disk
  echo "up: $MNT"
}
down() {
  local p
  umnt $MNT
  for i in 1 2 3; do p=$(cpid $i) && stop $p; done
  p=$(mpid) && stop $p
  echo down
}
wipe() { down; rm -rf $B; }
status() { mfscli -H 127.0.0.1 -P 19421 -SCS -SIM; }
case "${1:-}" in up|down|remount|wipe|status) $1;; mountpoint) echo $MNT;; *) echo "usage: $0 up|down|remount|mountpoint|status|wipe"; exit 2;; esac
