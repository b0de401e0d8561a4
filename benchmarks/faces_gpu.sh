#!/usr/bin/env bash
# From folders of photographs to the report on one GPU, at 64 x 64 pixels, meant for 25 minutes:
#   bash benchmarks/faces_gpu.sh PHOTOGRAPHS CATS
# PHOTOGRAPHS and CATS as in data/faces/run.py, of which this is a run with one seed. The time of
# the prior and the CLIP is fixed by their configs (model.hours). runs/faces-64/report.html is the page.
set -euo pipefail
photographs=$(realpath "$1") cats=$(realpath "$2")
cd "$(dirname "$0")/.."
time .venv/bin/python data/faces/run.py --photographs "$photographs" --cats "$cats" \
    --size 64 --seeds 0 --jobs 3 "${@:3}"
