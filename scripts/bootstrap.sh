#!/usr/bin/env bash
# Builds .venv from requirements.lock, or does nothing when it is already up to date.
#
#   scripts/bootstrap.sh                 build or refresh .venv
#   scripts/bootstrap.sh --find-python   print the Python 3.10 that would be used
#
# FUNNEL_PYTHON     the interpreter to use, instead of searching for one
# FUNNEL_INSTALLER  uv or pip; default: uv when it is on PATH, else pip
#                   (pip honours pip.conf, for instance a company mirror; uv reads its own settings)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'funnel: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# Prints nothing when $1 can build the environment, else the reason why it cannot.
# The probe must also parse in Python 2.
why_not() {
  local answer
  answer=$("$1" -c '
import os, sys, sysconfig
if sys.version_info[:2] != (3, 10):
    print("is Python %d.%d" % sys.version_info[:2])
elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("has no C headers; install python3.10-dev")
else:
    try:
        import ensurepip, venv
        print("fits")
    except ImportError:
        print("has no venv module; install python3.10-venv")
' </dev/null 2>/dev/null) || answer="does not run"
  [ "$answer" = fits ] || printf '%s' "${answer:-does not run}"
}

# Prints the candidates, best first: PATH, pyenv, uv. A pyenv shim on PATH may exist and still fail to run.
candidates() {
  type -aP python3.10 || true
  local root
  for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    compgen -G "${root:-/nonexistent}/versions/3.10.*/bin/python" | sort -rV || true
  done
  if command -v uv >/dev/null; then uv python find 3.10 2>/dev/null || true; fi
}

# Prints the path of a Python 3.10 that can build the environment.
find_python() {
  local python reason tried=""
  if [ -n "${FUNNEL_PYTHON:-}" ]; then
    reason=$(why_not "$FUNNEL_PYTHON")
    [ -z "$reason" ] || die "FUNNEL_PYTHON=$FUNNEL_PYTHON $reason; point it at a Python 3.10, or unset it."
    printf '%s\n' "$FUNNEL_PYTHON"
    return
  fi
  while IFS= read -r python; do
    reason=$(why_not "$python")
    if [ -z "$reason" ]; then
      printf '%s\n' "$python"
      return
    fi
    tried+="  $python $reason"$'\n'
  done < <(candidates | awk '!seen[$0]++')
  cat >&2 <<EOF
funnel: no usable Python 3.10 found (TFX 1.16 with ScaNN 1.3.2 is tested on 3.10 only). Tried:
${tried:-  nothing: python3.10 is not on PATH, pyenv has no 3.10, uv has no 3.10
}Fix it in one of three ways, then repeat the command:
  pyenv install 3.10
  uv python install 3.10
  FUNNEL_PYTHON=/path/to/python3.10 make ...
EOF
  exit 1
}

# Stops before a long install on a machine for which some wheel does not exist.
require_platform() {
  [ "$(uname -sm)" = "Linux x86_64" ] ||
    die "this is $(uname -sm); the wheels of TFX and ScaNN exist for Linux x86_64 only: use such a machine or container."
  local glibc
  glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2) || true
  [ -n "$glibc" ] || die "no glibc here (Alpine?); use a distribution with glibc 2.28 or later, such as Debian 10."
  [ "$(printf '%s\n' 2.28 "$glibc" | sort -V | head -n1)" = 2.28 ] ||
    die "glibc $glibc found, 2.28 or later needed (Debian 10, Ubuntu 20.04, RHEL 8)."
  command -v g++ >/dev/null ||
    die "no C++ compiler: one dependency (pyfarmhash) has no wheel; install g++ (Debian, Ubuntu: apt install g++)."
}

install_locked() {
  local python=$1 installer=${FUNNEL_INSTALLER:-}
  [ -n "$installer" ] || installer=$(command -v uv >/dev/null && echo uv || echo pip)
  say "building .venv with $python and $installer: $(grep -c '^[^ #].*==' requirements.lock) packages, some minutes, once"
  rm -rf .venv
  "$python" -m venv .venv
  # --no-deps: the lock is complete, and pip's resolver in hash mode rejects an extra of a locked package.
  local options=(--require-hashes --no-deps -r requirements.lock)
  case $installer in
    uv) VIRTUAL_ENV=$PWD/.venv uv pip install "${options[@]}" ;;
    pip) .venv/bin/python -m pip install --disable-pip-version-check "${options[@]}" ;;
    *) die "FUNNEL_INSTALLER=$installer; expected uv or pip." ;;
  esac
}

# The repo itself, editable. The lock brings setuptools, so nothing is fetched for this build.
install_project() {
  say "installing the project into .venv"
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
}

main() {
  # The path belongs to the key: a virtual environment does not survive being moved.
  local lock_key project_key
  lock_key=$(sha256sum <requirements.lock)$PWD
  project_key=$(cat setup.py pyproject.toml trainer/version.py | sha256sum)
  # The stamps are written last, so an interrupted build is never taken for a finished one.
  if ! [ -x .venv/bin/python ] || [ "$(cat .venv/lock.stamp 2>/dev/null)" != "$lock_key" ]; then
    local python started=$SECONDS
    require_platform
    python=$(find_python)
    install_locked "$python"
    printf '%s' "$lock_key" >.venv/lock.stamp
    say "packages installed in $((SECONDS - started)) s"
  fi
  if [ "$(cat .venv/project.stamp 2>/dev/null)" != "$project_key" ]; then
    install_project
    printf '%s' "$project_key" >.venv/project.stamp
  fi
}

case ${1:-} in
  "") main ;;
  --find-python) find_python ;;
  *) die "unknown option $1; see the head of scripts/bootstrap.sh." ;;
esac
