#!/usr/bin/env bash
# Installs Debian's chromium for the browser tests where there is none and apt-get may be used; never fails, always tells.
set -euo pipefail

say() { printf 'funnel: %s\n' "$*" >&2; }

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  say "NO CHROMIUM, and no root with apt-get to install it: the browser tests will be skipped"
  exit 0
fi
say "no chromium on PATH; installing Debian's"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1; then
  say "installed $(chromium --version)"
else
  tail -n 20 "$log" >&2
  say "CHROMIUM COULD NOT BE INSTALLED: the browser tests will be skipped"
fi
