#!/usr/bin/env bash
# LR-CNN's evaluation again, then its tables and figures: `scripts/regenerate.sh --quick` measures with
# small settings, `--full` with those of docs/experiments.md (hours), `--figures` only draws again from
# experiments/results/paper. Further arguments go to `python -m experiments.paper`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
  source scripts/venv.sh
  # The CUDA wheel is there to compile for GPUs that are absent.
  make_venv .venv experiments,cuda
fi
export JAX_PLATFORMS=cpu
exec "$PYTHON" -m experiments.paper "$@"
