#!/usr/bin/env bash
# Resolves setup.py and its extras, those built from source excepted, into requirements.lock. Arguments go to `uv pip compile` (--upgrade).
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
mv "$work/requirements.lock" requirements.lock
echo "requirements.lock: $(grep -c '^[^ #].*==' requirements.lock) packages"
