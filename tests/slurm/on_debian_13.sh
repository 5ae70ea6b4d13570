#!/bin/bash
# Tests of the launcher on SLURM 24.11, in a Debian 13 beside this machine's system: as root,
#   tests/slurm/on_debian_13.sh FOLDER tests/slurm/test_launching.py -k dry
# FOLDER holds the system (250 MB, made the first time with mmdebstrap). The checkout, its .venv and the interpreter below it are
# mounted there under their own names; nothing else of this machine's software is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(realpath -m "$1"); shift
if [ ! -x "$root/usr/sbin/slurmctld" ]; then
  command -v mmdebstrap >/dev/null || apt-get install -qq -y --no-install-recommends mmdebstrap >/dev/null
  mmdebstrap --quiet --variant=apt trixie "$root" --include=slurmctld,slurmd,slurm-client,munge,iproute2,procps,git \
    --include=libffi8,libssl3t64,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8t64,libgomp1
fi
base=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
command=$(printf '%q ' "$PWD/.venv/bin/python" -m pytest -m "exhaustive or not exhaustive" "$@")
exec unshare --mount --propagation private --pid --fork --kill-child bash -euc '
  root=$0
  for path in /dev /sys "$1" "$2"; do mkdir -p "$root$path"; mount --rbind "$path" "$root$path"; done
  mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp"
  cp /etc/hosts "$root/etc/hosts"
  exec chroot "$root" bash -c "cd $2 && OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $3"
' "$root" "$base" "$PWD" "$command"
