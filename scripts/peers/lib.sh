# helpers shared by the peer scripts
# state of every peer and of the benchmark lives here
: "${BENCH_DATA:?a directory for all that belongs to the benchmark: scripts/bench makes one}"
# alive PID NAME: the pid runs, is no zombie (of a pid 1 that does not reap), and its cmdline holds NAME
alive() {
  local p=${1:-} n=${2:-} st
  [ -n "$p" ] && [ -r /proc/$p/stat ] || return 1
  st=$(sed 's/.*) //' /proc/$p/stat 2>/dev/null | cut -c1); [ -n "$st" ] && [ "$st" != Z ] || return 1
  [ -z "$n" ] || tr '\0' ' ' < /proc/$p/cmdline 2>/dev/null | grep -q -- "$n"
}
pidof_file() { local p; p=$(cat "$1" 2>/dev/null | tr -dc 0-9); alive "$p" "${2:-}" && echo $p; }
# stop PID [SECONDS]: TERM, wait, then KILL
stop() { local p=$1 n=${2:-20}; kill $p 2>/dev/null; for t in $(seq $((n*5))); do alive $p || return 0; sleep 0.2; done; echo "kill -9 $p"; kill -9 $p 2>/dev/null; }
umnt() { local m=$1; mountpoint -q $m || return 0; for t in 1 2 3 4 5; do umount $m 2>/dev/null && return 0; sleep 0.5; done; umount -l $m; }
