#!/usr/bin/env bash
# One command for every check: style, types, tests. With --quick the tests marked slow or compiles
# are left out; other arguments go to pytest:
#   bash launch/test.sh [--quick] [-k name] [tests/test_losses.py ...]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package test
# One worker more than cores where all tests run: some of them wait for processes and heartbeats.
workers=$("$VENV/bin/python" -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
if [ "${1:-}" = --quick ]; then
  shift
  workers=auto
  set -- -m "not slow and not compiles" "$@"
fi

export JAX_PLATFORMS=cpu
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/shellcheck" launch/*.sh
"$VENV/bin/pyrefly" check --python-interpreter-path "$VENV/bin/python" --min-severity=warn
# Files side by side, each in one process: most tests compile or wait for a program of their own.
"$VENV/bin/python" -m pytest -q -n "$workers" --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder "$@"
