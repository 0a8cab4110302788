#!/usr/bin/env bash
# The small study on one GPU, base to tables, sized for nine minutes; launch/gpu_study.py says how.
#   EXTRAS=cuda bash launch/gpu_study.sh WORKDIR [--budget 530] [--out FILE.json]
#   bash launch/gpu_study.sh WORKDIR --size=toy    # rehearses it on a CPU
# Run it again to continue where it was stopped. Where there is no internet, docs/results/README.md
# says which wheels to carry over, and PYTHONPATH=$PWD python launch/gpu_study.py WORKDIR runs it.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"
exec "$VENV/bin/python" launch/gpu_study.py "$@"
