#!/usr/bin/env bash
# The nano study from nothing to its tables: every row of configs/study/rows.py, two runs at a time.
#   bash launch/study.sh WORKDIR [--jobs 2] [--rows method,sampled] [--dry-run | --table]
# With --study=small the small study: boards of several sizes in pictures of one size.
# Run it again to continue where it was stopped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"
exec "$VENV/bin/python" launch/study.py "$@"
