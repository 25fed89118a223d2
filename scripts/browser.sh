#!/usr/bin/env bash
# Install Chromium for the tests of the memory viewer, where that is possible without asking:
# as root on a system with apt. Elsewhere, or if it fails, say so and go on.
set -euo pipefail

command -v chromium chromium-browser google-chrome >/dev/null && exit 0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update --quiet && timeout 300 apt-get install --quiet --yes --no-install-recommends chromium
}
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
  echo "no Chromium: the tests of the memory viewer will be skipped (apt-get install chromium)" >&2
elif ! install </dev/null >"$log" 2>&1; then
  tail -n 3 "$log" >&2
  echo "Chromium could not be installed: the tests of the memory viewer will be skipped" >&2
fi
