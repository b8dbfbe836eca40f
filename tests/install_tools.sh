#!/bin/sh
# What tests use besides Python, where it can be had: a browser for the pages; Slurm, Open MPI, MPICH, sshd, pdsh and shellcheck for launch/; libaio.
# Quick if it is there; never fails: a test that lacks its tool skips itself and says so.
has() {
    for name in "$@"; do
        command -v "$name" >/dev/null 2>&1 && return 0
    done
    return 1
}
missing=""
has chromium chromium-browser google-chrome google-chrome-stable || missing="$missing chromium"
has slurmctld || missing="$missing slurm-wlm"
has munged || missing="$missing munge"
has ip || missing="$missing iproute2"
has mpirun || missing="$missing openmpi-bin"
has mpirun.mpich || missing="$missing mpich"
has pdsh || missing="$missing pdsh"
has sshd /usr/sbin/sshd || missing="$missing openssh-server"
has shellcheck || missing="$missing shellcheck"
[ -e /usr/include/libaio.h ] || missing="$missing libaio-dev"
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] && has apt-get || exit 0
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get update -qq >/dev/null 2>&1
echo "tests: installing$missing"
# shellcheck disable=SC2086 # a list
timeout 300 apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 && exit 0
# One by one: what cannot be had keeps nothing else away.
for package in $missing; do
    timeout 100 apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 ||
        echo "tests: $package could not be installed; tests that need it will be skipped"
done
exit 0
