#!/usr/bin/env bash
# One command for every check: style, types, tests. Arguments go to pytest:
#   bash launch/test.sh [-m "not slow"] [tests/test_losses.py ...]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package test

export JAX_PLATFORMS=cpu
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/shellcheck" launch/*.sh
"$VENV/bin/pyright" --pythonpath "$VENV/bin/python"
# Files side by side, each in one process: most tests compile or wait for a program of their own.
"$VENV/bin/python" -m pytest -q -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
