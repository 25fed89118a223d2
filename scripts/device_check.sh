#!/usr/bin/env bash
# On a machine with an accelerator: is everything exact there, and do time and memory come as predicted? At most
# seven minutes. Takes the `python` at hand, with jax, flax, optax and chex in it, and nothing else.
#
#   bash scripts/device_check.sh [FOLDER] [--quick] [--only JOB...]     results go to FOLDER, or $OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# -eq 0 || $1 == --* ]]; then
  set -- "${OUT:?give a folder for the results, or set OUT}" "$@"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# The check ends by itself at 410 s; this is for one that hangs.
exec timeout --kill-after=3 417 "${PYTHON:-python}" scripts/device_check.py "$@"
