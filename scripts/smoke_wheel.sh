#!/usr/bin/env bash
# Builds the wheel and the source distribution, installs each into empty environments of every Python from 3.11 to
# 3.13 that is there, and runs scripts/smoke.py in them: first with nothing but lrjax's own requirements, then with
# the command line's. Nothing of this checkout is importable there.
#
#   bash scripts/smoke_wheel.sh [PYTHON...]     e.g. python3.12; by default all that are found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=cpu
unset PYTHONPATH

pythons=("$@")
if ((${#pythons[@]} == 0)); then
  for candidate in python3.11 python3.12 python3.13; do
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      pythons+=("$candidate")
    else
      echo "no $candidate with venv: left out" >&2
    fi
  done
fi
((${#pythons[@]})) || { echo "no Python 3.11 to 3.13 with venv was found" >&2; exit 1; }

install() { # ENVIRONMENT WHAT...
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

"${pythons[0]}" -m venv "$work/build"
install "$work/build" build
"$work/build/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
source=$(echo "$work"/dist/*.tar.gz)

for python in "${pythons[@]}"; do
  for distribution in "$wheel" "$source"; do
    echo "== $("$python" --version), $(basename "$distribution")"
    rm -rf "$work/empty"
    "$python" -m venv "$work/empty"
    install "$work/empty" "$distribution"
    (cd "$work" && "$work/empty/bin/python" "$root/scripts/smoke.py" library)
    [[ $distribution == "$wheel" ]] || continue
    install "$work/empty" "$distribution[experiments]"
    (cd "$work" && "$work/empty/bin/python" "$root/scripts/smoke.py" command)
  done
done
echo "the distributions work"
