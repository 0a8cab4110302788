#!/usr/bin/env bash
# Makes the nano base model that the quickstart starts from, anew:
#   bash launch/nano_base.sh WORKDIR
# Copy WORKDIR/export over mgsd_jax/assets/nano_base to ship it.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"

WORKDIR=${1:?usage: bash launch/nano_base.sh WORKDIR}
mkdir -p "$WORKDIR"
trap 'exit 130' INT
run() {
  "$VENV/bin/python" -m mgsd_jax.main --config="configs/$1.py" "${@:2}"
}
run nano_sight --stage=init --workdir="$WORKDIR"
run nano_base --stage=grounding --workdir="$WORKDIR/text" --set model.path="$WORKDIR/init"
run nano_sight --stage=grounding --workdir="$WORKDIR/sight" --set model.path="$WORKDIR/init" \
  --set grounding.student="$WORKDIR/text/grounding"
run nano_finish --stage=grounding --workdir="$WORKDIR"
run nano_finish --stage=export --workdir="$WORKDIR"
