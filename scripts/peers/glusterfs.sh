#!/bin/bash
# GlusterFS 10.3 peer: replica 3 volume, 3 bricks on this machine, mounted by FUSE.
# usage: glusterfs.sh up | down | remount | mountpoint | status | wipe
set -u
P=$(dirname "$(readlink -f "$0")"); . "$P/lib.sh"
B=$BENCH_DATA/gluster
MNT=$BENCH_DATA/mnt-glusterfs
VOL=peervol
HOST=$(hostname)          # must resolve to 127.0.0.1 (gluster rejects the literal "localhost")
# extra "gluster volume set" pairs, e.g. GLUSTER_SET="performance.client-io-threads=on performance.md-cache-timeout=600"
SETS=${GLUSTER_SET:-}
MOUNT_OPTS=${GLUSTER_MOUNT_OPTS:-}
PIDF=$B/run/glusterd.pid

g() { gluster --mode=script "$@"; }
gpid() { pidof_file $PIDF glusterd; }
conf() {
  mkdir -p $B/run $B/log $B/glusterd $B/brick1 $B/brick2 $B/brick3
  getent hosts $HOST | grep -q '^127\.' || { echo "hostname $HOST does not resolve to loopback"; return 1; }
  cat > $B/glusterd.vol <<E
volume management
    type mgmt/glusterd
    option working-directory $B/glusterd
    option run-directory $B/run
    option transport-type socket
    option transport.socket.keepalive-time 10
    option transport.socket.keepalive-interval 2
    option transport.socket.read-fail-log off
    option transport.socket.listen-port 24007
    option transport.socket.bind-address $HOST
    option ping-timeout 0
    option event-threads 1
    option max-port  60999
end-volume
E
}
mnt() {
  mkdir -p $MNT
  mount -t glusterfs -o log-file=$B/log/mnt.log,log-level=WARNING${MOUNT_OPTS:+,$MOUNT_OPTS} $HOST:/$VOL $MNT || return 1
  for t in $(seq 40); do mountpoint -q $MNT && break; sleep 0.25; done
}
remount() { umnt $MNT; mnt; }
up() {
  if mountpoint -q $MNT; then echo "already mounted: $MNT"; return 0; fi
  conf || return 1
  gpid >/dev/null || glusterd -f $B/glusterd.vol -p $PIDF -l $B/log/glusterd.log -L WARNING || return 1
  for t in $(seq 40); do g volume info >/dev/null 2>&1 && break; sleep 0.5; done
  if ! g volume info $VOL >/dev/null 2>&1; then
    g volume create $VOL replica 3 $HOST:$B/brick1 $HOST:$B/brick2 $HOST:$B/brick3 force || return 1
  fi
  for kv in $SETS; do g volume set $VOL ${kv%%=*} ${kv#*=} || return 1; done
  g volume info $VOL | grep -q 'Status: Started' || g volume start $VOL || return 1
  for t in $(seq 60); do [ "$(g volume status $VOL 2>/dev/null | grep -c '^Brick.* Y ')" = 3 ] && break; sleep 0.5; done
  mnt || return 1
  # wait until the client sees all three bricks
  for t in $(seq 40); do touch $MNT/.probe 2>/dev/null && [ "$(ls -d $B/brick?/.probe 2>/dev/null | wc -l)" = 3 ] && break; sleep 0.5; done
  rm -f $MNT/.probe
  echo "up: $MNT"
}
down() {
  local p
  umnt $MNT
  if gpid >/dev/null; then g volume info $VOL 2>/dev/null | grep -q Started && g volume stop $VOL force; fi
  # self-heal daemon and bricks are gone now; then glusterd
  p=$(gpid) && stop $p
  for f in $(find $B/run $B/glusterd -name '*.pid' 2>/dev/null); do p=$(pidof_file $f gluster) && stop $p; done
  echo down
}
wipe() { down; rm -rf $B; }
status() { g volume info $VOL; g volume status $VOL; }
case "${1:-}" in up|down|remount|wipe|status) $1;; mountpoint) echo $MNT;; *) echo "usage: $0 up|down|remount|mountpoint|status|wipe"; exit 2;; esac
