#!/usr/bin/env bash
# Resolves setup.py and its extras, those built from source excepted, into requirements.lock, and what the image of the
# model server needs into serving/requirements.lock, at the same versions. Arguments go to `uv pip compile` (--upgrade).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(scripts/bootstrap.sh --find-python)
work=$(mktemp -d .lock.XXXXXX)
trap 'rm -rf "$work"' EXIT
uv=$(command -v uv) || {
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet uv
  uv=$work/venv/bin/uv
}
# Written beside and renamed: an interrupted resolution leaves the old lock whole.
cp requirements.lock "$work/requirements.lock" 2>/dev/null || true
"$uv" pip compile setup.py --extra vertex --extra benchmarks --extra dev --generate-hashes --python "$python" --no-emit-index-url \
  --custom-compile-command "make lock" --output-file "$work/requirements.lock" --quiet "$@"
"$uv" pip compile serving/requirements.in --constraint "$work/requirements.lock" --generate-hashes --python "$python" \
  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file "$work/server.lock" --quiet
mv "$work/requirements.lock" requirements.lock
mv "$work/server.lock" serving/requirements.lock
for lock in requirements.lock serving/requirements.lock; do
  echo "$lock: $(grep -c '^[^ #].*==' "$lock") packages"
done
