#!/usr/bin/env bash
# Train on several machines without a scheduler: run the same command on each of them.
#   HEAD=10.0.0.1 MACHINES=4 examples/launch/machines.sh RECIPE --out /shared/runs/one data.streams=32
# HEAD: the address of one of them, which the others reach at port 29400 (or PORT).
#
# - The recipe, the token shards, the vocabulary and --out lie in a folder that all machines share.
# - When a rank or a machine dies, the others wait for it to come back (start the command there
#   again) and go on from the last checkpoint, up to three times.
set -euo pipefail
: "${HEAD:?the address of one of the machines}" "${MACHINES:?how many they are}"

exec "$(dirname "$0")/node.sh" --nnodes "$MACHINES" --nproc-per-node "${PROCESSES:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${ID:-mmpt}" \
    --max-restarts 3 -m mmpt train "$@"
