#!/usr/bin/env bash
# From a bare checkout to what lrjax is and what it is for, in minutes on two CPU cores: makes
# .venv-quickstart, and then
# 1. trains VGG-16 (with a quarter of its channels) on handwritten digits scattered over 512x512
#    pixels with every strategy from one seed, prints what each one cost, and saves the plot. Status
#    1 if a loss differs from column's by more than 1e-4 of it.
# 2. trains a small network on the sum of two digits on 384x384 pixels, within the memory that lrjax
#    takes there: with lrjax, and with column on the largest image that fits. Status 1 if lrjax is
#    right on less than 90% of the held-out canvases or leads by less than 20 points.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

export JAX_PLATFORMS=cpu
make_venv .venv-quickstart experiments

# The learning rate is one at which rounding is not amplified: at 0.01 the loss shoots over after 30
# steps, and curves of any two strategies part.
out=${1:-runs/quickstart}
.venv-quickstart/bin/lrjax compare-strategies --out "$out" --overwrite \
  --strategy column --strategy stream:16 --strategy 2ps:4 --strategy overl:4 \
  --strategy 2ps:8,2@pool2 \
  --data digits --digits 0,1 --image-size 512 --batch 2 --balanced --width 0.25 \
  --steps 32 --optimizer sgd --lr 0.006 --seed 0

exec "$PYTHON" -m experiments.resolution --quick --out "$out/resolution.json"
