#!/usr/bin/env bash
# Makes the nano base model that the quickstart starts from, anew:
#   bash launch/nano_base.sh WORKDIR
# Copy WORKDIR/export over mgsd_jax/assets/nano_base to ship it.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_package "${EXTRAS:-}"

WORKDIR=${1:?usage: bash launch/nano_base.sh WORKDIR}
mkdir -p "$WORKDIR"
for stage in init grounding export; do
  "$VENV/bin/python" -m mgsd_jax.main --stage="$stage" --config=configs/nano_base.py --workdir="$WORKDIR"
done
