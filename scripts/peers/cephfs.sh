#!/bin/bash
# Ceph 16.2.15 peer: 1 mon, 1 mgr, 3 bluestore OSDs (file-backed), 1 MDS, size=3 min_size=2, mounted by ceph-fuse.
# usage: ceph.sh up | down | remount | mountpoint | status | wipe
set -u
P=$(dirname "$(readlink -f "$0")"); . "$P/lib.sh"
B=$BENCH_DATA/ceph
MNT=$BENCH_DATA/mnt-cephfs
CONF=$B/ceph.conf
OSD_SIZE=${CEPH_OSD_SIZE:-10G}            # sparse block file of each OSD
OSD_MEM=${CEPH_OSD_MEM:-939524096}        # osd_memory_target (ceph minimum 896 MiB)
CLASS=${CEPH_CLASS:-ssd}                  # bluestore/osd tuning set: a virtual disk may call itself rotational, and ceph would take "hdd" (CEPH_CLASS=default)
CLIENT_CONF=${CEPH_CLIENT_CONF:-}         # extra "[client]" lines, ';' separated
export CEPH_CONF=$CONF CEPH_DEV=1
c() { ceph -c $CONF "$@"; }
pf() { pidof_file $B/run/$1.pid ceph-${1%%.*}; }

conf() {
  mkdir -p $B/blk $B/run $B/log $B/mon $B/mgr $B/mds $B/osd0 $B/osd1 $B/osd2
  [ -e $B/fsid ] || uuidgen > $B/fsid
  cat > $CONF <<E
[global]
fsid = $(cat $B/fsid)
mon host = [v2:127.0.0.1:23300,v1:127.0.0.1:26789]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $B/keyring
run dir = $B/run
admin socket = $B/run/\$cluster-\$name.\$pid.asok
pid file = $B/run/\$type.\$id.pid
log file = $B/log/\$cluster-\$name.log
mon cluster log file = $B/log/\$cluster.log
crash dir = $B/crash
mon allow pool size one = true
mon allow pool delete = true
osd pool default size = 3
osd pool default min size = 2
osd crush chooseleaf type = 0
osd pool default pg num = 16
osd pool default pgp num = 16
osd pool default pg autoscale mode = off
mon warn on insecure global id reclaim = false
mon warn on insecure global id reclaim allowed = false
auth allow insecure global id reclaim = false
mon warn on pool no redundancy = false
mon data avail warn = 3
mon data avail crit = 1
mon osd nearfull ratio = 0.9
[mon]
mon data = $B/mon
[mgr]
mgr data = $B/mgr
mgr initial modules =
mgr disabled modules = dashboard restful prometheus cephadm rook k8sevents diskprediction_local influx zabbix
[mds]
mds data = $B/mds
mds cache memory limit = 1073741824
[osd]
osd data = $B/osd\$id
$([ $CLASS = default ] || echo "bluestore debug enforce settings = $CLASS")
osd objectstore = bluestore
osd memory target = $OSD_MEM
osd memory target autotune = false
osd class update on start = false
bluestore fsck on mount = false
bluestore block size = $(numfmt --from=iec $OSD_SIZE)
bluestore block path = $B/blk/osd\$id.img
bluestore block create = true
bluestore block db path =
bluestore block wal path =
osd crush update on start = true
[client]
$(echo "$CLIENT_CONF" | tr ';' '\n')
E
}
mkmon() {
  [ -e $B/mon/kv_backend ] && return 0
  rm -f $B/keyring $B/monmap
  ceph-authtool --create-keyring --gen-key --name=mon. $B/keyring --cap mon 'allow *' &&
  ceph-authtool --gen-key --name=client.admin $B/keyring --cap mon 'allow *' --cap osd 'allow *' --cap mds 'allow *' --cap mgr 'allow *' &&
  monmaptool --create --clobber --fsid $(cat $B/fsid) --addv a '[v2:127.0.0.1:23300,v1:127.0.0.1:26789]' $B/monmap &&
  ceph-mon -c $CONF --mkfs -i a --monmap=$B/monmap --keyring=$B/keyring
}
mnt() {
  mkdir -p $MNT
  ceph-fuse -c $CONF -n client.admin --keyring $B/keyring $MNT >> $B/log/up.log 2>&1 || { tail $B/log/up.log; return 1; }
  for t in $(seq 40); do mountpoint -q $MNT && break; sleep 0.5; done
}
cfuse() { pidof_file $B/run/client.admin.pid ceph-fuse; }
umount_client() { local p; p=$(cfuse); umnt $MNT; for t in $(seq 100); do alive "$p" ceph-fuse || break; sleep 0.2; done; }
remount() { umount_client; mnt; }
up() {
  if mountpoint -q $MNT; then echo "already mounted: $MNT"; return 0; fi
  conf
  ulimit -n $(ulimit -Hn)
  { mkmon || exit 1
    pf mon.a >/dev/null || ceph-mon -c $CONF -i a || exit 1
  } >> $B/log/up.log 2>&1 || { tail $B/log/up.log; return 1; }
  timeout 60 ceph -c $CONF --connect-timeout 30 mon stat || return 1
  if ! pf mgr.x >/dev/null; then
    [ -e $B/mgr/keyring ] || c auth get-or-create mgr.x mon 'allow profile mgr' mds 'allow *' osd 'allow *' -o $B/mgr/keyring
    ceph-mgr -c $CONF -i x --keyring $B/mgr/keyring >> $B/log/up.log 2>&1 || return 1
  fi
  for i in 0 1 2; do
    if [ ! -e $B/osd$i/ready ]; then
      rm -rf $B/osd$i $B/blk/osd$i.img; mkdir -p $B/osd$i
      u=$(uuidgen); k=$(ceph-authtool --gen-print-key)
      echo "{\"cephx_secret\": \"$k\"}" > $B/osd$i.json
      id=$(c osd new $u -i $B/osd$i.json) || return 1
      [ "$id" = $i ] || { echo "osd id $id, wanted $i"; return 1; }
      printf '[osd.%s]\n\tkey = %s\n' $i "$k" > $B/osd$i/keyring
      ceph-osd -c $CONF -i $i --mkfs --osd-uuid $u --keyring $B/osd$i/keyring >> $B/log/up.log 2>&1 || { tail $B/log/up.log; return 1; }
      touch $B/osd$i/ready
    fi
    pf osd.$i >/dev/null || ceph-osd -c $CONF -i $i --keyring $B/osd$i/keyring >> $B/log/up.log 2>&1 || return 1
  done
  for t in $(seq 60); do [ "$(c osd stat -f json 2>/dev/null | python3 -c 'import json,sys;print(json.load(sys.stdin)["num_up_osds"])')" = 3 ] && break; sleep 1; done
  if ! c fs ls -f json 2>/dev/null | grep -q peerfs; then
    c osd pool create cephfs_meta 16 && c osd pool create cephfs_data 32 && c fs new peerfs cephfs_meta cephfs_data || return 1
  fi
  if ! pf mds.a >/dev/null; then
    [ -e $B/mds/keyring ] || c auth get-or-create mds.a mon 'allow profile mds' osd 'allow rw tag cephfs *=*' mds 'allow' mgr 'allow profile mds' -o $B/mds/keyring
    ceph-mds -c $CONF -i a --keyring $B/mds/keyring >> $B/log/up.log 2>&1 || return 1
  fi
  for t in $(seq 90); do c mds stat 2>/dev/null | grep -q 'up:active' && break; sleep 1; done
  for t in $(seq 60); do c pg stat 2>/dev/null | grep -qE '^([0-9]+) pgs: \1 active\+clean;' && break; sleep 1; done
  mnt || return 1
  mountpoint -q $MNT && echo "up: $MNT"
}
down() {
  local p
  umount_client
  for n in mds.a osd.0 osd.1 osd.2 mgr.x mon.a; do p=$(pf $n) && stop $p 30; done
  # A metadata server that the monitor has missed for a while starts itself anew, and its file does not tell.
  for p in $(pgrep -f -- "^[^ ]*ceph-[a-z]+ -c $CONF "); do stop $p 30; done
  rm -f $B/run/*.asok
  echo down
}
wipe() { down; rm -rf $B; }
status() { c -s; c osd df; c osd pool ls detail; }
case "${1:-}" in up|down|remount|wipe|status) $1;; mountpoint) echo $MNT;; *) echo "usage: $0 up|down|remount|mountpoint|status|wipe"; exit 2;; esac
