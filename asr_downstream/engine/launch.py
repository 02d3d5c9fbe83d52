"""Starting the processes of a launch, and exchanging what all of them have to know."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, gather_object
from mmengine.config import Config

from asr_downstream.engine.data.images import BadFiles
from asr_downstream.engine.state.train_state import SHARDED
from asr_downstream.errors import AsrError, DataError, OtherProcessError
from asr_downstream.files.atomic import first_line

__all__ = ['end_processes', 'gather_bad', 'others_may_end', 'start_processes', 'world']

GONE = re.compile(r'gloo|Connection (closed|reset)|NCCL', re.IGNORECASE)  # what back ends say


def world() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def start_processes(config: Config) -> Accelerator:
    """Join the processes of this launch: accelerate's and torchrun's environment variables say which.

    Raises:
        AsrError: several were launched, but accelerate sees one.
    """
    launched = world()
    AcceleratorState._reset_state()  # of a training before, in this process: it may have had another precision
    accelerator = Accelerator(
        cpu=launched > 1 and not torch.accelerator.is_available(),  # else CPU processes do not find each other
        mixed_precision=config.mixed_precision,
        # A plugin, because a number gives way to an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.num_processes != launched:
        raise AsrError(
            f'{launched} processes were launched, but accelerate sees {accelerator.num_processes}: on CPU use torchrun '
            f'--nproc_per_node N, on GPUs accelerate launch --multi_gpu --num_processes N'
        )
    if accelerator.distributed_type in SHARDED and (config.use_ema or config.validation_steps):
        raise AsrError(
            f'{accelerator.distributed_type.value} shards the weights, which can then be neither averaged nor sampled '
            f'on one process: add --cfg-options use_ema=False validation_steps=0'
        )
    return accelerator


def end_processes() -> None:
    """Close the process group, after the last training of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
