#!/usr/bin/env bash
# From a bare checkout to a comparison: makes .venv-quickstart, trains VGG-16 (an eighth to a quarter
# of its channels, so that two CPU cores suffice) on handwritten digits scattered over 512x512 pixels
# with every strategy from one seed, and prints what each one cost. Status 1 if losses differ.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

export JAX_PLATFORMS=cpu
make_venv .venv-quickstart experiments

exec .venv-quickstart/bin/lrjax compare-strategies --out "${1:-runs/quickstart}" \
  --strategy column --strategy stream:16 --strategy 2ps:4 --strategy overl:4 \
  --strategy 2ps:8,2@pool2 \
  --data digits --digits 0,1 --image-size 512 --batch 1 --width 0.25 \
  --steps 30 --optimizer sgd --lr 1e-3 --seed 0
