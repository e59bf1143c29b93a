# Machines of their own: network namespaces, each with one link to a switch. For `scripts/bench --links`, which sources this.

LINKS_PREFIX=hf$$

# The address of machine number $1.
link_address() { echo "10.221.7.$1"; }

# Runs a program as machine number $1, whose mounts all machines see.
on_machine() {
    local machine=$1
    shift
    nsenter --net="/run/netns/$LINKS_PREFIX-$machine" "$@"
}

# Starts a daemon as machine number $1, logs to the directory $2, and notes there which process it is: the daemon itself, which `exec` makes of
# the shell in the background.
start_on() {
    local machine=$1 dir=$2
    shift 2
    (exec nsenter --net="/run/netns/$LINKS_PREFIX-$machine" "$@") >> "$dir/log" 2>&1 &
    echo $! >> "$dir/pids"
}

# Makes a switch and the machines 1 to $1, whose links carry $2 (as tc(8) writes rates) each way.
make_links() {
    local n
    ip netns add "$LINKS_PREFIX-hub"
    ip -n "$LINKS_PREFIX-hub" link add switch type bridge
    ip -n "$LINKS_PREFIX-hub" link set switch up
    for n in $(seq "$1"); do
        ip netns add "$LINKS_PREFIX-$n"
        ip -n "$LINKS_PREFIX-$n" link set lo up
        ip -n "$LINKS_PREFIX-hub" link add "port$n" type veth peer name eth0 netns "$LINKS_PREFIX-$n"
        ip -n "$LINKS_PREFIX-hub" link set "port$n" master switch up
        ip -n "$LINKS_PREFIX-$n" address add "$(link_address "$n")/24" dev eth0
        ip -n "$LINKS_PREFIX-$n" link set eth0 up
        tc -n "$LINKS_PREFIX-$n" qdisc add dev eth0 root tbf rate "$2" burst 256k latency 20ms
        tc -n "$LINKS_PREFIX-hub" qdisc add dev "port$n" root tbf rate "$2" burst 256k latency 20ms
    done
}

# $1: where the programs are, $2: rates of links, $3: the page whose table is made anew, or to whose end it is added.
compare_links() {
    local bin=$1 page=$3 rate table
    # Still there when the script ends.
    rates=$2 dir=$(mktemp -d "${TMPDIR:-/tmp}/holdfast-links.XXXXXX")
    trap 'for rate in $rates; do remove_links "$dir/$rate"; done; rm -rf "$dir"' EXIT
    trap 'exit 130' INT TERM
    table=$dir/table
    {
        echo "<!-- what follows is made by scripts/bench --links -->"
        echo "Build $BENCH_COMMIT; $(nproc) cores, Linux $(uname -r | sed s/-.*//)."
        echo
        echo "| links | | relay | MB/s | sent by the mount's machine, of what was written or read | received |"
        echo "|---|---|---|---:|---:|---:|"
    } > "$table"
    for rate in $rates; do
        make_links 5 "$rate"
        measure_links "$bin" "$dir/$rate" 1024 | sed "s/^/| $rate /" | tee -a "$table"
        remove_links "$dir/$rate"
        rm -rf "${dir:?}/$rate"
    done
    echo "<!-- made by scripts/bench --links until here -->" >> "$table"
    touch "$page"
    awk -v table="$table" '
        function put(line) { while ((getline line < table) > 0) print line; done = 1 }
        /^<!-- what follows is made by scripts\/bench --links -->$/ { put(); skipping = 1 }
        !skipping
        /^<!-- made by scripts\/bench --links until here -->$/ { skipping = 0 }
        END { if (!done) put() }' "$page" > "$dir/page"
    cat "$dir/page" > "$page"
}

# A line of a table for each way to send: a cluster of four machines, written to and read from by a fifth. $1: where the programs are, $2: a
# directory of its own, $3: MiB.
measure_links() {
    local bin=$1 dir=$2 mib=$3 relay n meta
    mkdir -p "$dir"
    "$bin/holdfast" up --dir "$dir/cluster" --no-mount > "$dir/log"
    "$bin/holdfast" down --dir "$dir/cluster" >> "$dir/log"
    meta=$(link_address 1):7400
    sed -i "s/^listen = .*/listen = \"$meta\"/" "$dir/cluster/meta/meta.toml"
    sed -i "s/^meta = .*/meta = \"$meta\"/" "$dir/cluster/client.toml" "$dir/cluster/admin.toml"
    start_on 1 "$dir" "$bin/holdfastd" meta --config "$dir/cluster/meta/meta.toml"
    for n in 1 2 3; do
        local config="$dir/cluster/storage-$n/storage.toml"
        sed -i "s/^listen = .*/listen = \"$(link_address $((n + 1))):7401\"/; s/^meta = .*/meta = \"$meta\"/" "$config"
        start_on $((n + 1)) "$dir" "$bin/holdfastd" storage --config "$config"
    done
    mkdir -p "$dir/mnt"
    for relay in never auto never auto; do
        if ! on_machine 5 "$bin/holdfast" mount -o "relay=$relay" "$dir/cluster" "$dir/mnt" >> "$dir/log"; then
            tail -5 "$dir/log" >&2
            return 1
        fi
        links_job "$relay" write "$dir/mnt/file" "$mib" --end_fsync=1
        umount "$dir/mnt"
        sync
        echo 3 > /proc/sys/vm/drop_caches
        on_machine 5 "$bin/holdfast" mount "$dir/cluster" "$dir/mnt" >> "$dir/log"
        links_job - read "$dir/mnt/file" "$mib"
        rm "$dir/mnt/file"
        umount "$dir/mnt"
    done
}

# One line: what was done how fast, and how many bytes left and reached the link of the mount's machine.
links_job() {
    local relay=$1 what=$2 file=$3 mib=$4 before after speed
    shift 4
    before=$(link_bytes)
    speed=$(fio --name=links --ioengine=psync --fallocate=none --refill_buffers=1 --rw="$what" --bs=1M --size="${mib}M" --filename="$file" \
        --output-format=json "$@" | sed -n '/"'"$what"'" *:/,/}/s/.*"bw_bytes" *: *\([0-9]*\).*/\1/p' | head -1)
    after=$(link_bytes)
    awk -v relay="$relay" -v what="$what" -v speed="$speed" -v mib="$mib" -v before="$before" -v after="$after" 'BEGIN {
        split(before, b); split(after, a); bytes = mib * 1048576
        printf "| %s | %s | %.0f | %.2f | %.2f |\n", what, relay, speed / 1e6, (a[1] - b[1]) / bytes, (a[2] - b[2]) / bytes }'
}

# Sent and received by machine 5 so far.
link_bytes() {
    on_machine 5 sh -c 'sed -n "s/^ *eth0: *//p" /proc/net/dev' | awk '{ print $9, $1 }'
}

# Ends what runs in the directory $1, and takes the machines away.
remove_links() {
    local dir=$1 pid n
    ! mountpoint -q "$dir/mnt" || umount "$dir/mnt" || umount -l "$dir/mnt"
    for pid in $(cat "$dir/pids" 2> /dev/null); do
        kill "$pid" 2> /dev/null || continue
        while kill -0 "$pid" 2> /dev/null; do sleep 0.1; done
    done
    rm -f "$dir/pids"
    for n in hub 1 2 3 4 5; do ip netns delete "$LINKS_PREFIX-$n" 2> /dev/null || true; done
}
