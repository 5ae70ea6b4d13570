#!/bin/sh
# Open icons as a deduplicated data set: fetch, render, tokenize, deduplicate. Run it in a checkout, with npm, resvg_py
# and pyarrow at hand. Each step is left out if it was finished before. WORKERS: processes (default 2).
set -eu
python=${PYTHON:-python}
[ -d icon-sets/node_modules/@iconify-json/uil ] || npm install --prefix icon-sets --ignore-scripts --no-audit --no-fund \
  $($python examples/icons/render.py --packages)
$python examples/icons/render.py icon-sets/node_modules/@iconify-json data/icons-documents --workers "${WORKERS:-2}"
$python -m mmscale data prepare examples/icons/icons.yaml --out data/icons --workers "${WORKERS:-2}"
$python -m mmscale data dedup data/icons --match image --max-cluster 20000 --workers "${WORKERS:-2}"
$python -m mmscale data inspect data/icons
