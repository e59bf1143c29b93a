#!/bin/bash
# libfuse's pass-through of a local directory, with one copy: about what FUSE itself costs.
set -u
P=$(dirname "$(readlink -f "$0")"); . "$P/lib.sh"
B=$BENCH_DATA/passthrough
MNT=$BENCH_DATA/mnt-passthrough
BIN=$BENCH_DATA/bin/passthrough_ll
up() {
  if mountpoint -q $MNT; then echo "already mounted: $MNT"; return 0; fi
  mkdir -p $B $MNT $BENCH_DATA/bin
  [ -x $BIN ] || { S=/usr/share/doc/libfuse3-dev/examples; gcc -O2 -I$S $S/passthrough_ll.c $(pkg-config fuse3 --cflags --libs) -o $BIN || return 1; }
  $BIN -o source=$B,clone_fd $MNT || return 1
  for t in $(seq 20); do mountpoint -q $MNT && break; sleep 0.2; done
  echo "up: $MNT"
}
down() { umnt $MNT; echo down; }
case "${1:-}" in up|down) $1;; remount) down && up;; wipe) down; rm -rf $B;; mountpoint) echo $MNT;; status) mount | grep $MNT;;
  *) echo "usage: $0 up|down|remount|mountpoint|status|wipe"; exit 2;; esac
