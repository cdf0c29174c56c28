#!/usr/bin/env bash
# Train on one machine with all of its GPUs:
#   examples/launch/torchrun.sh examples/recipes/tiny.toml --out runs/tiny data.streams=8
# PROCESSES=2 in front of it starts so many instead, also on a machine without a GPU.
#
# - Every process ("rank") reads rows of its own: data.streams must be a multiple of their number
#   (of parallel.tensor ranks, which read the same rows, only one counts).
# - What `mmpt plan RECIPE --gpus 8` recommends is given as overrides: parallel.expert=2 ...
# - A rank that dies takes the others down; torchrun starts all again, up to three times, and they
#   go on from the last checkpoint. Later, the same command goes on, too.
# - Control-C, SIGTERM: a checkpoint is written, and all end.
set -euo pipefail

# else ranks that are started again find the addresses of those that died (pytorch/pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts 3 \
    -m mmpt train "$@"
