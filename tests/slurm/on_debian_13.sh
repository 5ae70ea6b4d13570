#!/bin/bash
# Tests of the launcher on SLURM 24.11, in a Debian 13 beside this machine's system: as root,
#   tests/slurm/on_debian_13.sh FOLDER tests/slurm/test_launching.py -k dry
# `make test-slurm-24` runs all of them. FOLDER holds the system (300 MB, made the first time with mmdebstrap). The checkout, its
# .venv, the interpreter below it and other folders that it imports from are mounted there under their own names; nothing else of
# this machine is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(realpath -m "$1"); shift
if [ ! -x "$root/usr/sbin/slurmctld" ]; then
  command -v mmdebstrap >/dev/null || apt-get install -qq -y --no-install-recommends mmdebstrap >/dev/null
  mmdebstrap --quiet --variant=apt trixie "$root" --include=slurmctld,slurmd,slurm-client,munge,iproute2,procps,git \
    --include=libffi8,libssl3t64,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8t64,libgomp1
fi
base=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
# A .venv may borrow packages of another one.
mapfile -t others < <(.venv/bin/python -c 'import os, sys
print(*{p for p in sys.path if os.path.isdir(p) and not p.startswith((sys.base_prefix, os.getcwd()))}, sep="\n")')
command=$(printf '%q ' "$PWD/.venv/bin/python" -m pytest "$@")
exec unshare --mount --propagation private --pid --fork --kill-child bash -euc '
  root=$0
  mount --bind "$root" "$root"  # nodes unshare mounts, which needs a / that is one
  for path in /dev /sys "$1" "$2" "${@:4}"; do [ -n "$path" ] || continue; mkdir -p "$root$path"; mount --rbind "$path" "$root$path"; done
  mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp"
  cp /etc/hosts "$root/etc/hosts"
  # No chroot: who enters a mount namespace (nsenter) begins at its own root, which must be this system.
  mkdir -p "$root/.host"; cd "$root"; pivot_root . .host
  exec chroot . bash -c "umount --lazy /.host && cd $2 && OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $3"
' "$root" "$base" "$PWD" "$command" "${others[@]}"
