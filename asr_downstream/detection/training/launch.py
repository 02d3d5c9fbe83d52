"""The processes of a launch: GPUs through MMEngine, CPU processes through gloo."""

from __future__ import annotations

import os

import torch
from mmengine.config import Config
from mmengine.dist import init_dist

from asr_downstream.errors import AsrError

__all__ = ['is_first', 'join', 'largest', 'start']

# Where a launcher says which process this is.
RANK = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


def join(config: Config, launcher: str, would: str = 'train') -> None:
    """Say in a config how its Runner finds the other processes; on CPU, find them here and now.

    MMEngine's own launcher binds every process to a GPU and fails where there is none.

    Args:
        config: changed in place.
        launcher: ``'none'``, ``'pytorch'`` (torchrun, `tools/dist_train.sh`) or ``'slurm'``.
        would: what each process would do alone, for messages.

    Raises:
        AsrError: the launcher is not the one that started this process.
    """
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    if launcher == 'none':
        if launched > 1:
            raise AsrError(f'{launched} processes were launched, but each would {would} alone: add --launcher pytorch')
        return
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise AsrError(
            '--launcher pytorch: this process was not started by torchrun; use tools/dist_train.sh CONFIG GPUS'
        )
    if launcher == 'slurm' and 'SLURM_PROCID' not in os.environ:
        raise AsrError('--launcher slurm: this process was not started by srun')
    config.launcher = launcher
    if torch.cuda.is_available():
        return
    if launcher == 'slurm':
        raise AsrError('--launcher slurm: needs GPUs; on CPU use tools/dist_train.sh')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    config.env_cfg = {**(config.get('env_cfg') or {}), 'dist_cfg': {'backend': 'gloo'}}
    config.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'device_ids': None,
        'find_unused_parameters': config.get('find_unused_parameters', False),
    }


def start(config: Config, launcher: str) -> None:
    """Join the processes of a launch for a test, which has no Runner to do it; see `join`."""
    join(config, launcher, would='test')
    if launcher != 'none' and torch.cuda.is_available():
        init_dist(launcher, **(config.get('env_cfg') or {}).get('dist_cfg', {'backend': 'nccl'}))


def is_first(config: Config) -> bool:
    """Whether this process is the first of its launch; on GPUs they find each other only later, in the Runner."""
    return int(os.environ.get(RANK.get(config.get('launcher', 'none'), ''), '0')) == 0


def largest(*values: float) -> list[float]:
    """Largest of each value over all processes; all of them must ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return list(values)
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    found = torch.tensor(values, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()
