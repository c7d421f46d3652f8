#!/usr/bin/env bash
# What the tests on a real Slurm need, from Debian's packages: nothing where it is there, or where apt-get is not.
set -euo pipefail

PACKAGES="slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2"

missing=no
for command in slurmctld slurmd sbatch munged slurmdbd mariadbd ip; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing=yes
done
[ "$missing" = yes ] || exit 0
echo "slurm: installing $PACKAGES (half a minute)"
# Their services are not started: the tests start their own, on ports and sockets of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null >/dev/null
# shellcheck disable=SC2086  # a list of words
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $PACKAGES </dev/null >/dev/null
