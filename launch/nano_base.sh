#!/usr/bin/env bash
# Makes the nano base model that the quickstart starts from, anew:
#   bash launch/nano_base.sh WORKDIR [plans|small]
# With `plans` a base that has seen plans in its prompt, which the study's rows of plans start from;
# with `small` the base of the small study, for boards of several sizes in pictures of one size.
# Run it again to continue where it was stopped.
# Copy WORKDIR/export over mgsd_jax/assets/nano_base to ship it.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"

WORKDIR=${1:?usage: bash launch/nano_base.sh WORKDIR [plans|small]}
VARIANT=${2:-}
mkdir -p "$WORKDIR"
trap 'exit 130' INT
run() {
  "$VENV/bin/python" -m mgsd_jax.main --config="configs/nano_base.py:$1${VARIANT:+,$VARIANT}" "${@:2}"
}
run sight --stage=init --workdir="$WORKDIR"
run text --stage=grounding --workdir="$WORKDIR/text" --set model.path="$WORKDIR/init"
run sight --stage=grounding --workdir="$WORKDIR/sight" --set model.path="$WORKDIR/init" \
  --set grounding.student="$WORKDIR/text/grounding"
run finish --stage=grounding --workdir="$WORKDIR"
run finish --stage=export --workdir="$WORKDIR"
