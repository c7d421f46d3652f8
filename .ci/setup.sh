#!/usr/bin/env bash
# What does a bare Debian or Ubuntu machine need before ghostmask runs? System libraries, .venv, packages.
#
# Idempotent: .venv/.ghostmask-setup holds a hash of what was installed; while it matches, nothing is done.
# Nothing is installed outside .venv but the system packages that are found missing. PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/.ghostmask-setup
NEEDED_GB=8 # .venv with torch's CUDA libraries, and the largest package while it is unpacked
FITS='import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else 1)'

main() {
    if [ -s "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted)" ]; then
        return
    fi
    local interpreter
    interpreter=$(find_python) || exit 1
    install_system_packages "$interpreter"
    check_disk
    make_venv "$interpreter"
    install_packages
    check_imports
    wanted >"$STAMP"
    say "done"
}

say() { echo "setup: $*"; }

# A hash of everything that decides what .venv holds; empty where .venv has no working interpreter of a fitting version.
wanted() {
    "$VENV/bin/python" -c "$FITS" 2>/dev/null || return 0
    { pwd; "$VENV/bin/python" --version; cat pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1
}

# The first interpreter of a fitting version: $PYTHON, .venv's own, or what PATH offers. (A name in PATH may be a
# version manager's shim that does not run, so each is tried.)
find_python() {
    local name
    for name in ${PYTHON:-"$VENV/bin/python" python3 python3.12 python3.11}; do
        if "$name" -c "$FITS" 2>/dev/null; then
            "$name" -c 'import os, sys; print(os.path.realpath(sys._base_executable))'
            return
        fi
    done
    {
        say "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3, python3.12, python3.11})."
        say "install one, e.g. on Debian 12 or Ubuntu 24.04: apt-get install python3 python3-venv python3-dev"
        say "or name one: PYTHON=/path/to/python3.12 make ..."
    } >&2
    return 1
}

# A disk that gets full in the middle leaves half an installation, and errors that do not say so.
check_disk() {
    local free
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
    if [ "$free" -lt "$NEEDED_GB" ] && ! [ -d "$(echo "$VENV"/lib/python*/site-packages/torch)" ]; then
        say "needs $NEEDED_GB GB on the disk of $PWD, where $free GB are free; free some, or clone to a larger disk" >&2
        exit 1
    fi
}

# Debian's names of what is missing. Asks for the thing itself, not for the package, so that machines that have it
# from elsewhere pass.
missing_packages() {
    local interpreter=$1 prefix=python3 version
    version=$("$interpreter" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    if [ "$(realpath "$(command -v /usr/bin/python3 || true)" 2>/dev/null)" != "$interpreter" ]; then
        prefix=$version
    fi
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v c++ && command -v cc; } >/dev/null || echo g++
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    "$interpreter" -c 'import ensurepip, venv' 2>/dev/null || echo "$prefix-venv"
    "$interpreter" - <<<'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || echo "$prefix-dev"
}

install_system_packages() {
    local missing sudo=""
    missing=$(missing_packages "$1" | tr '\n' ' ')
    missing=${missing% }
    [ -n "$missing" ] || return 0
    say "missing on this machine: $missing"
    [ "$(id -u)" = 0 ] || sudo="sudo "
    if ! command -v apt-get >/dev/null || { [ -n "$sudo" ] && ! sudo -n true 2>/dev/null; }; then
        say "cannot install them from here; run this, then the same make command again:"
        echo "    ${sudo}apt-get update && ${sudo}apt-get install -y --no-install-recommends $missing"
        exit 1
    fi
    say "installing them with ${sudo}apt-get (1 to 3 minutes)"
    # shellcheck disable=SC2086  # missing is a list of words
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends $missing
    missing=$(missing_packages "$1" | tr '\n' ' ')
    if [ -n "$missing" ]; then
        say "still missing for $1 after that: $missing"
        exit 1
    fi
}

# apt-get without questions and, unless it fails, without its list of unpacked files.
as_root() {
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive "$@" -o Dpkg::Use-Pty=0 </dev/null >/dev/null
}

make_venv() {
    if "$VENV/bin/python" -c "$FITS; import pip" 2>/dev/null; then
        return
    fi
    say "making $VENV with $("$1" --version) ($1)"
    "$1" -m venv --clear "$VENV"
}

# The same versions everywhere: the constraints also hold for the environments that source packages are built in
# (PIP_CONSTRAINT for older pip, PIP_BUILD_CONSTRAINT for newer). torch and torchvision come first and together, both
# from the default index: a CPU-only torch beside the index's torchvision fails at import.
install_packages() {
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check --use-pep517)
    [ -t 1 ] || pip+=(--quiet)
    export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
    say "installing torch and torchvision (5 GB with the CUDA libraries; about 3 minutes the first time)"
    "${pip[@]}" torch torchvision
    say "installing DeepSpeed, FFCV (compiled here) and the rest (about 2 minutes the first time)"
    "${pip[@]}" --editable '.[dev]'
}

check_imports() {
    say "checking the installation"
    "$VENV/bin/python" -W ignore -c 'import torch, torchvision, deepspeed, ffcv, sklearn, ghostmask.launcher.main' >/dev/null
}

main
