# Sourced by the scripts: installs what is missing on Debian and Ubuntu, and says so.

# Where cargo installs what need_crate builds.
export PATH="$HOME/.cargo/bin:$PATH"

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_updated=
# need COMMAND PACKAGE: installs PACKAGE unless COMMAND is there.
need() {
    command -v "$1" > /dev/null || install_package "$2"
}

# need_file FILE PACKAGE: installs PACKAGE unless FILE is there.
need_file() {
    [ -e "$1" ] || install_package "$2"
}

install_package() {
    if ! command -v apt-get > /dev/null; then
        echo "$1 is missing, and this is not Debian or Ubuntu: install it by hand" >&2
        exit 1
    fi
    echo "installing $1" >&2
    [ -n "$apt_updated" ] || as_root apt-get update -qq
    apt_updated=yes
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" > /dev/null
}

need_rust() {
    if ! command -v cargo > /dev/null; then
        echo "cargo is missing: install Rust 1.95 or newer, see rust-lang.org" >&2
        exit 1
    fi
}

# need_crate COMMAND CRATE VERSION: builds a tool from crates.io unless COMMAND is there.
need_crate() {
    command -v "$1" > /dev/null && return
    echo "building $2 $3" >&2
    cargo install --quiet --locked "$2" --version "$3"
}
