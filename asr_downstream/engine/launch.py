"""Starting the processes of a launch, and exchanging what all of them have to know."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from mmengine.config import Config

from asr_downstream.console.processes import Processes, end_processes
from asr_downstream.engine.data.images import BadFiles
from asr_downstream.engine.state.train_state import SHARDED
from asr_downstream.errors import AsrError, DataError, OtherProcessError
from asr_downstream.files.atomic import first_line

__all__ = ['end_processes', 'gather_bad', 'join', 'others_may_end', 'start_processes', 'start_sharing', 'world']

GONE = re.compile(r'gloo|Connection (closed|reset)|NCCL', re.IGNORECASE)  # what back ends say
PATIENCE = timedelta(hours=24)  # the others wait while the first one measures
# What shards weights -> where accelerate's launcher says that it was asked for.
SHARDERS = {'FSDP': 'ACCELERATE_USE_FSDP', 'DeepSpeed': 'ACCELERATE_USE_DEEPSPEED'}


def world() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def start_processes(config: Config) -> Accelerator:
    """Join the processes of this launch, for a training.

    Raises:
        AsrError: see `join`, or the weights would be sharded and the config asks for what needs them whole.
    """
    accelerator = join(
        mixed_precision=config.mixed_precision,
        # A plugin, because a number gives way to an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.distributed_type in SHARDED and (config.use_ema or config.validation_steps or config.gate_steps):
        raise said_once(
            f'{accelerator.distributed_type.value} shards the weights, which can then be neither averaged nor sampled '
            f'nor recorded on one process: add --cfg-options use_ema=False validation_steps=0 gate_steps=0'
        )
    return accelerator


def join(**settings: Any) -> Accelerator:
    """Join the processes of this launch: accelerate's and torchrun's environment variables say which.

    Args:
        settings: of the `Accelerator`.

    Raises:
        AsrError: accelerate does not start what it was asked for: one process instead of several, or no shards.
    """
    launched = world()
    check_several(launched)
    AcceleratorState._reset_state()  # of a training before, in this process: it may have had another precision
    accelerator = Accelerator(cpu=launched > 1 and not torch.accelerator.is_available(), **settings)
    # cpu: else CPU processes do not find each other
    if accelerator.num_processes != launched:
        raise AsrError(
            f'{launched} processes were launched, but accelerate sees {accelerator.num_processes}: on CPU use torchrun '
            f'--nproc_per_node N, on GPUs accelerate launch --multi_gpu --num_processes N'
        )
    for name, variable in SHARDERS.items():
        if os.environ.get(variable, '').lower() == 'true' and accelerator.distributed_type not in SHARDED:
            end_processes()
            raise said_once(
                f'{name} is asked for, but shards nothing on {accelerator.device.type}: accelerate would go on with '
                f'whole weights; launch on GPUs, or without {name}'
            )
    return accelerator


def check_several(launched: int) -> None:
    """Refuse the one process that ``accelerate launch`` starts on CPU, whatever number it is asked for.

    Raises:
        AsrError: see above.
    """
    asked_for_several = 'ACCELERATE_MIXED_PRECISION' in os.environ and 'MASTER_ADDR' in os.environ
    if launched == 1 and asked_for_several and 'WORLD_SIZE' not in os.environ:
        raise AsrError(
            'accelerate launch was asked for several processes and started one, as it does on CPU: use python -m '
            'asr_downstream.console.torchrun --nproc_per_node N'
        )


def said_once(message: str) -> AsrError:
    """Error that all processes of a launch raise, and the first one says."""
    return (OtherProcessError if int(os.environ.get('RANK', '0')) else AsrError)(message)


def start_sharing() -> Processes:
    """Join the processes of this launch, to share what needs no training.

    Raises:
        AsrError: see `join`.
    """
    if world() > 1:
        join(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    else:
        check_several(1)
    return Processes.of_launch()


def gather_bad(accelerator: Accelerator, bad: BadFiles) -> None:
    """Let processes agree on the files that are bad.

    Raises:
        DataError: too many are; on all processes.
    """
    if accelerator.num_processes > 1:
        bad.add(gather_object(sorted(bad.found)))
    try:
        bad.check()
    except DataError:
        if accelerator.is_main_process:
            raise
        raise OtherProcessError('too many files are bad') from None


@contextmanager
def others_may_end(accelerator: Accelerator) -> Iterator[None]:
    """Turn the errors of a process whose partner is gone into one line.

    Raises:
        AsrError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes > 1 and (
            isinstance(error, torch.distributed.DistError) or GONE.search(str(error))
        ):
            raise AsrError(
                f'process {accelerator.process_index}: another process of this launch has ended ({first_line(error)}); '
                f'see what it says, and continue with --resume'
            ) from error
        raise
