#!/bin/bash
# Holdfast as `holdfast up` makes it: one metadata and three storage servers. HOLDFAST_BIN: where its programs are.
# usage: holdfast.sh up | down | remount | mountpoint | status | wipe
set -u
P=$(dirname "$(readlink -f "$0")"); . "$P/lib.sh"
BIN=${HOLDFAST_BIN:?}
D=$BENCH_DATA/holdfast
MNT=$BENCH_DATA/mnt-holdfast
up() { mkdir -p $MNT; $BIN/holdfast up --dir $D --mount $MNT; }
down() { $BIN/holdfast down --dir $D; }
remount() { umnt $MNT && $BIN/holdfast mount $D $MNT; }
wipe() { [ ! -e $D ] || { down; rm -rf $D; }; }
status() { $BIN/holdfast status --dir $D; }
case "${1:-}" in up|down|remount|wipe|status) $1;; mountpoint) echo $MNT;; *) echo "usage: $0 up|down|remount|mountpoint|status|wipe"; exit 2;; esac
