#!/usr/bin/env bash
# One command from nothing to a trained, evaluated and exported nano model, and a report of it:
#   bash launch/quickstart.sh [WORKDIR] [--set a.b=value ...]
#
#   WORKDIR          where everything goes; runs/quickstart by default
#   --set a.b=value  changes one field of configs/nano.py, as --set of the program does; repeatable
#   --help           prints this
#
# It makes .venv and installs mgsd_jax there. PYTHON=/path picks the interpreter, VENV=/path another
# place, EXTRAS=cuda an accelerator. Run it again to continue where it was stopped.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() {
  echo "quickstart: $1; see --help" >&2
  exit 2
}

WORKDIR='' SETTINGS=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --set)
      [ $# -gt 1 ] || refuse "--set: a value is required, such as grounding.steps=80"
      SETTINGS+=(--set "$2") && shift
      ;;
    --set=*) SETTINGS+=(--set "${1#--set=}") ;;
    -*) refuse "got $1, want --set, --help or a folder" ;;
    '') refuse "got an empty name of a folder" ;;
    *)
      [ -z "$WORKDIR" ] || refuse "got a second folder $1, want one"
      WORKDIR=$1
      ;;
  esac
  shift
done
case $WORKDIR in
  '') ;;
  /* | *://*) ;;
  *) WORKDIR=$PWD/$WORKDIR ;; # the scripts go to the checkout
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"
echo "quickstart: $("$VENV/bin/python" --version), $VENV/bin/python"

WORKDIR=${WORKDIR:-$ROOT/runs/quickstart}
# A stage that is asked in its last step ends well, and no other should begin then.
trap 'echo "quickstart: stopped by Ctrl-C; the same command goes on from here"; exit 130' INT
SECONDS=0
for stage in generate grounding distillation evaluate export report; do
  echo "quickstart: $stage (after ${SECONDS}s)"
  "$VENV/bin/python" -m mgsd_jax.main --stage="$stage" --config=configs/nano.py \
    --workdir="$WORKDIR" "${SETTINGS[@]}"
done
echo "quickstart: done in ${SECONDS}s"
echo "quickstart: open $WORKDIR/report/index.html; the model is in $WORKDIR/export"
