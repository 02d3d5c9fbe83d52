#!/usr/bin/env bash
# Train with several processes: one a GPU, or without GPUs on the CPU.
#
#   tools/dist_train.sh CONFIG PROCESSES [options of tools/train_det.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 PORT=29500 tools/dist_train.sh CONFIG 8    # and NODE_RANK=1 on the other
#
# The batch size of a config is that of one process: give --auto-scale-lr to scale the learning rate with their number.
# Python is $PYTHON, or that of the active environment, or of .venv beside tools/, or python3.
set -euo pipefail
if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
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
python=
for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
  "$here/../.venv/bin/python" python python3; do
  if [ -n "$candidate" ] && found=$(command -v "$candidate"); then
    python=$(cd "$(dirname "$found")" && pwd)/${found##*/}
    break
  elif [ -n "$candidate" ] && [ "$candidate" = "${PYTHON:-}" ]; then
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no python found${PYTHON:+ at PYTHON=$PYTHON}; run make setup, or give one with PYTHON=" >&2
  exit 1
fi
# what is beside the current folder does not count: the script is started by its path
has='import sys; sys.path[:] = filter(None, sys.path); from importlib.util import find_spec as f
sys.exit(not (f("torch") and f("asr_downstream")))'
if ! "$python" -c "$has" >/dev/null 2>&1; then
  echo "error: $python has no torch or no asr_downstream; run make setup, or give another one with PYTHON=" >&2
  exit 1
fi
exec "$python" -m asr_downstream.console.torchrun "${where[@]}" --nproc_per_node "$processes" \
  "$here/train_det.py" "$config" --launcher pytorch "$@"
