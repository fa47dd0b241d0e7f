#!/usr/bin/env bash
# The same recipe on several machines. On every node, or once under srun with one task per node:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun_cluster.sh RECIPE --run-dir SHARED/DIR [--set key=value]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun_cluster.sh RECIPE --run-dir SHARED/DIR
#   srun launch/torchrun_cluster.sh RECIPE --run-dir SHARED/DIR
#
# NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are torchrun's; under srun Slurm says them. `--help` lists the rest;
# docs/cluster.md explains. ASYNC_RL_PYTHON: the Python that async_rl is installed in; default: that of this checkout's
# .venv, else the first in PATH.
set -euo pipefail

if [ -n "${SLURM_STEP_NODELIST:-}" ]; then
  export NNODES=${NNODES:-$SLURM_STEP_NUM_NODES} NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
  if [ -z "${MASTER_ADDR:-}" ]; then
    first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    # the address that Slurm itself uses: the node's name need not resolve
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${MASTER_ADDR:-$first}
  fi
  # jobs that share a node do not meet, and a copy of this job that should be dead does not either
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  export ASYNC_RL_START_ID=${ASYNC_RL_START_ID:-$SLURM_JOB_ID.$SLURM_STEP_ID.${SLURM_RESTART_COUNT:-0}}
fi

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${ASYNC_RL_PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m async_rl.launch.cluster "$@"
