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
# Types are checked beside the tests, and said after them.
said=$(mktemp)
"$VENV/bin/pyright" --pythonpath "$VENV/bin/python" >"$said" &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
# Files side by side, each in one process: most tests compile or wait for a program of their own.
code=0
"$VENV/bin/python" -m pytest -q -n "$workers" --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder "$@" || code=$?
wait "$types" || code=1
cat "$said"
exit "$code"
