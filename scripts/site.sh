#!/usr/bin/env bash
# The documentation as a site, in a virtual environment of its own:
#
#   bash scripts/site.sh           # builds it, to site/
#   bash scripts/site.sh serve     # shows it on 127.0.0.1:8000, and again when a page changes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

export JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1
make_venv .venv-docs docs
if [[ ${1:-build} == serve ]]; then
  exec "$PYTHON" -m mkdocs serve
fi
exec "$PYTHON" -m mkdocs build --strict
