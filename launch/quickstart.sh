#!/usr/bin/env bash
# One command from nothing to a trained, evaluated and exported nano model, and a report of it:
#   bash launch/quickstart.sh [WORKDIR]
# Run it again to continue where it was stopped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"

WORKDIR=${1:-$ROOT/runs/quickstart}
mkdir -p "$WORKDIR"
# A stage that is asked in its last step ends well, and no other should begin then.
trap 'echo "quickstart: stopped by Ctrl-C; the same command goes on from here"; exit 130' INT
SECONDS=0
for stage in generate grounding distillation evaluate export report; do
  echo "quickstart: $stage (after ${SECONDS}s)"
  "$VENV/bin/python" -m mgsd_jax.main --stage="$stage" --config=configs/nano.py --workdir="$WORKDIR"
done
echo "quickstart: done in ${SECONDS}s"
echo "quickstart: open $WORKDIR/report/index.html; the model is in $WORKDIR/export"
