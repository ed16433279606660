#!/bin/sh
# Prepare the system for the Makefile's targets.
#
#   tools/prepare.sh packages PURPOSE   check the Debian packages for setup, demo, bench, test or fuzz:
#                                       as root install the missing ones, otherwise print the command
#   tools/prepare.sh python             print the interpreter for .venv (3.11 or later, with venv)
#
# PYTHON in the environment selects the interpreter. No service is started.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # an ordinary user's PATH often lacks clamd's and spamd's directory

# package, a command or file that it provides, the purposes that need it
needs() {
    cat <<'END'
gcc            gcc                                  setup demo bench test fuzz
libc6-dev      /usr/include/stdio.h                 setup demo bench test fuzz
musl-tools     musl-gcc                             setup demo bench test fuzz
clang          clang                                fuzz
libclang-rt-dev /usr/share/doc/libclang-rt-dev      fuzz
clamav-daemon  clamd                                demo bench test
spamd          spamd                                demo bench test
mpack          munpack                              test fuzz
uudeview       uudeview                             test fuzz
libmime-tools-perl /usr/share/doc/libmime-tools-perl test fuzz
gir1.2-gmime-3.0 /usr/share/doc/gir1.2-gmime-3.0    test fuzz
python3-gi     /usr/share/doc/python3-gi            test fuzz
mailfront      smtpfront-qmail                      test
mandoc         mandoc                               test
mariadb-server mariadbd                             bench test
libdbd-mariadb-perl /usr/share/doc/libdbd-mariadb-perl test
chromium       chromium                             test
prometheus     promtool                             test
END
}

# A virtual environment needs pip's bundled wheel, which Debian splits off into python3-venv.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python() {
    for candidate in ${PYTHON:-python3 /usr/bin/python3 python3.13 python3.12 python3.11}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

missing() { # PURPOSE -> names of packages, one line
    python >/dev/null || printf 'python3-venv '
    needs | while read -r package proof purposes; do
        case " $purposes " in *" $1 "*) ;; *) continue ;; esac
        command -v "$proof" >/dev/null || [ -e "$proof" ] || printf '%s ' "$package"
    done
}

# Debian starts a daemon on installation unless this file forbids it. It does so only while this
# script runs, so a copy left behind by a kill is harmless.
policy=/usr/sbin/policy-rc.d
hold_services() {
    [ -e "$policy" ] && return
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\n# left by tools/prepare.sh; safe to delete\n[ -d /proc/%s ] && exit 101\nexit 0\n' $$ >"$policy"
    chmod 755 "$policy"
}

install() {
    export DEBIAN_FRONTEND=noninteractive
    echo "installing Debian packages: $*"
    hold_services
    # The lists may be absent (a fresh container) or older than the archive (404 on download).
    apt-get -qq --simulate install --no-install-recommends "$@" >/dev/null 2>&1 || apt-get -qq update
    apt-get -qq -y install --no-install-recommends "$@" ||
        { apt-get -qq update && apt-get -qq -y install --no-install-recommends "$@"; }
}

packages() { # PURPOSE
    absent=$(missing "$1")
    [ -z "$absent" ] && return
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        # shellcheck disable=SC2086  # a list of words
        install $absent >&2
        absent=$(missing "$1")
        [ -z "$absent" ] && return
        echo "still missing after the installation: $absent" >&2
    else
        echo "missing packages: $absent" >&2
        echo "to install them, run as root:" >&2
        echo "  apt-get install --no-install-recommends $absent" >&2
    fi
    case $absent in
    python3-venv*) echo "(a python3 of 3.11 or later with its venv module; PYTHON=/path/to/python3 chooses one)" >&2 ;;
    esac
    exit 1
}

case ${1:-} in
packages) packages "${2:-setup}" ;;
python) python ;;
*)
    sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
