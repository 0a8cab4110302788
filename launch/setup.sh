# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment of this checkout, installed once per
# version of pyproject.toml. PYTHON picks the interpreter, EXTRAS the extras (test, tpu, cuda).
set -euo pipefail

# Containers often set it, and then every start would compile thousands of modules: ten seconds.
unset PYTHONDONTWRITEBYTECODE

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

complain() {
  echo "setup: $1" >&2
  return 2
}

# What a Python says of itself: its version, and where it is installed; nothing if it does not run.
describe_python() {
  "$1" -c 'import sys; print(*sys.version_info[:2], sep=".", end=" "); print(sys.base_prefix)' \
    2>/dev/null || true
}

is_supported() { case $1 in 3.11\ * | 3.12\ * | 3.13\ *) ;; *) false ;; esac }

find_python() {
  local candidate said
  if [ -n "${PYTHON:-}" ]; then
    said=$(describe_python "$PYTHON")
    if [ -z "$said" ]; then
      complain "PYTHON: got $PYTHON, which does not run, want a Python 3.11 to 3.13"
    elif ! is_supported "$said"; then
      complain "PYTHON: got $PYTHON, Python ${said%% *}, want 3.11 to 3.13"
    else
      command -v "$PYTHON"
    fi
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if is_supported "$(describe_python "$candidate")"; then
      command -v "$candidate"
      return
    fi
  done
  complain "found no Python 3.11, 3.12 or 3.13; install one, or set PYTHON=/path/to/python"
}

install_package() {
  local extras=${1:-} python stamp held
  python=$(find_python)
  VENV=${VENV:-$ROOT/.venv}
  stamp=$VENV/.installed${extras:+-$extras}
  if [ -n "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then
    held=$(describe_python "$VENV/bin/python")
    if [ "$(describe_python "$python")" != "$held" ]; then
      complain "PYTHON: got $PYTHON, and $VENV was made by another Python ($held); remove it, \
unset PYTHON, or set VENV to another folder"
    fi
  fi
  if [ ! -x "$VENV/bin/python" ] || [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    # One that was stopped in the making has a python and no pip.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$VENV"
    echo "setup: installing mgsd_jax${extras:+[$extras]} into $VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    # Twice quiet: errors alone. Setuptools would warn of every editable installation. Modules are
    # compiled where they are first imported, and most of 18,000 never are.
    "$VENV/bin/python" -m pip install --quiet --quiet --no-compile -e ".${extras:+[$extras]}"
    touch "$stamp"
  fi
}
