#!/usr/bin/env bash
# What the tests of shell completion need beside bash, from Debian's packages: nothing where apt-get is not.
set -euo pipefail
for shell in zsh fish; do
    command -v "$shell" >/dev/null || missing=yes
done
[ "${missing:-no}" = yes ] && command -v apt-get >/dev/null || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null >/dev/null
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 zsh fish </dev/null >/dev/null
