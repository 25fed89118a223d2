#!/usr/bin/env bash
# Sourced by the other scripts: `make_venv DIR EXTRAS` creates (or reuses) a virtual environment
# with this package installed in editable mode, and sets PYTHON to its interpreter.
# LRJAX_PYTHON names the interpreter to build it from; otherwise the newest working 3.13..3.11 is taken.

find_python() {
  local candidate
  for candidate in ${LRJAX_PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
  done
  echo "no Python 3.11 to 3.13 with venv was found; install one or set LRJAX_PYTHON" >&2
  return 1
}

make_venv() {
  local directory=$1 extras=$2 wanted base
  PYTHON="$directory/bin/python"
  base=$(find_python)
  wanted="$("$base" --version) $PWD [$extras] $(cksum <pyproject.toml)"
  if [[ -x $PYTHON && $(cat "$directory/.installed" 2>/dev/null) == "$wanted" ]]; then
    return 0
  fi
  "$base" -m venv --clear "$directory"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  echo "$wanted" >"$directory/.installed"
}
