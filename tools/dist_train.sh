#!/usr/bin/env bash
# Train with several processes: one a GPU, or without GPUs on the CPU.
#
#   tools/dist_train.sh CONFIG PROCESSES [options of tools/train_det.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 PORT=29500 tools/dist_train.sh CONFIG 8    # and NODE_RANK=1 on the other
#
# The batch size of a config is that of one process: give --auto-scale-lr to scale the learning rate with their number.
set -euo pipefail
if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
config=$1
processes=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
  where=(--standalone)
else
  where=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --nproc_per_node "$processes" \
  "$here/train_det.py" "$config" --launcher pytorch "$@"
