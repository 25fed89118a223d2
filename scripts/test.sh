#!/usr/bin/env bash
# Format, lint, layers, types and the whole test suite, slow tests included, in this checkout's own .venv.
# Arguments go to pytest: `bash scripts/test.sh tests/models/test_vgg.py -k gap`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

# The CUDA and TPU wheels are there to compile for devices that are absent; everything runs on the
# CPU.
export JAX_PLATFORMS=cpu
make_venv .venv experiments,dev,docs,cuda,tpu

bin=.venv/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/lint-imports" --no-logo
"$bin/mypy"
# Two workers at most: a compilation for a large device can take several GiB.
workers=$(nproc)
((workers > 2)) && workers=2
exec "$PYTHON" -m pytest -n "$workers" --durations=10 "$@"
