#!/usr/bin/env bash
# torchrun on one node, for the other files here: passes signals to the ranks.
#
# SIGUSR1 says that the time is nearly up. It would end torchrun, which does not know it; so torchrun
# ignores it, and it goes to the ranks, which write a checkpoint and ask SLURM to run the job again.
# A scheduler may signal the ranks itself as well: they ignore a second one.
set -euo pipefail

# else ranks that are started again find the addresses of those that died (pytorch/pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

trap '' USR1 # what is started from here on ignores it, unless it says otherwise
torchrun "$@" &
launcher=$!
signalled=yes
trap 'signalled=yes; pkill -USR1 -P "$launcher" || true' USR1
trap 'signalled=yes; kill -TERM "$launcher" || true' TERM INT

while [[ -n $signalled ]]; do # a signal ends `wait`, though torchrun may still run
    signalled='' status=0
    wait "$launcher" || status=$?
done
exit "$status"
