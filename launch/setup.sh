# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment of this checkout, installed once per
# version of pyproject.toml. PYTHON picks the interpreter, EXTRAS the extras (test, tpu, cuda).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: found no Python 3.11, 3.12 or 3.13; install one, or set PYTHON=/path/to/python" >&2
  return 1
}

install_package() {
  local extras=${1:-} python stamp
  python=$(find_python)
  VENV=${VENV:-$ROOT/.venv}
  stamp=$VENV/.installed${extras:+-$extras}
  if [ ! -x "$VENV/bin/python" ] || [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    # One that was stopped in the making has a python and no pip.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$VENV"
    echo "setup: installing mgsd_jax${extras:+[$extras]} into $VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}"
    touch "$stamp"
  fi
}
