#!/usr/bin/env bash
# Run on a GPU machine without a network, in the root of the checkout; wheels lie in .gpu/ (docs/install.md says which).
#     bash tests/gpu/offline.sh 1 [OUT]       mmscale bench gpu --part 1, JSON into OUT (default: .)
#     bash tests/gpu/offline.sh 2 [OUT]       the same, part 2
#     bash tests/gpu/offline.sh tests         the tests that need a GPU
# Each takes at most 8 minutes. Torch comes with the machine; nothing is installed outside of .site/.
set -euo pipefail
part=${1:?"1, 2 or tests"}
out=${2:-.}
export PYTHONPATH="$PWD/.site:$PWD" PYTHONUNBUFFERED=1
if [ ! -e .site/.complete ]; then
  rm -rf .site
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target .site .gpu/*.whl
  touch .site/.complete
fi
# cuDNN's attention, not flash-attn's.
export NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m mmscale doctor || true
case "$part" in
  1 | 2) timeout 590 python3 -m mmscale bench gpu --part "$part" --seconds 460 --out "$out/gpu-$part.json" ;;
  tests) OMP_NUM_THREADS=1 timeout 590 python3 -m pytest -q -p no:cacheprovider tests/gpu ;;
  *) echo "error: $part is neither 1, 2 nor tests" >&2; exit 2 ;;
esac
