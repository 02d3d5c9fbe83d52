"""Training with FSDP2, whose weights are sharded over two CPU processes: checkpoints are whole, fold and resume.

accelerate shards on GPUs alone; here its state is told to, and all that follows is its own code and torch's, with gloo.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.diffusion import ASR, write_config
from safetensors.torch import load_file

from asr_downstream.diffusion.evaluation.fold import compare, fold_run
from asr_downstream.diffusion.runs import load_run

pytestmark = pytest.mark.slow

PROGRAM = """
import sys

from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine import launch

join = launch.join


def sharded(**settings):
    accelerator = join(**settings)
    accelerator.state.distributed_type = PartialState._shared_state['distributed_type'] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['ResnetBlock2D'],
        cpu_ram_efficient_loading=False,
    )
    accelerators.append(accelerator)
    return accelerator


accelerators = []
_, config, out, *words = sys.argv
if 'sharded' in words:
    launch.join = sharded
config = load_config(config)
config.output_dir = out
train(config, 'latest' if 'resume' in words else None)
if accelerators:
    print('shards:', sum(isinstance(module, FSDPModule) for module in accelerators[0]._models[0].modules()))
launch.end_processes()
"""


def two(folder: Path, config: Path, out: Path, *words: str) -> str:
    """Train in two processes; returns what they said."""
    (folder / 'program.py').write_text(PROGRAM)
    start = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*start, str(folder / 'program.py'), str(config), str(out), *words],
        cwd=folder, env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_sharded_training_is_the_whole_one_resumes_and_folds(tmp_path: Path) -> None:
    options = dict(plug=ASR, use_ema=False, max_train_steps=4, checkpointing_steps=2, train_batch_size=4)
    descent = dict(
        optimizer='sgd', learning_rate=0.02, max_grad_norm=100.0
    )  # Adam would hide another scale of gradients
    config = write_config(tmp_path, **options, **descent)
    two(tmp_path, config, tmp_path / 'whole')
    said = two(tmp_path, config, tmp_path / 'sharded', 'sharded')
    shards = re.search(r'shards: (\d+)', said)
    assert shards is not None
    assert int(shards[1]) > 8  # eight residual blocks and the rest
    found, expected = (load_file(tmp_path / name / 'checkpoint-4/model.safetensors') for name in ('sharded', 'whole'))
    assert found.keys() == expected.keys()
    start = load_file(tmp_path / 'whole' / 'checkpoint-2/model.safetensors')
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert any((start[name] - value).abs().max() > 1e-4 for name, value in expected.items())

    shutil.copytree(tmp_path / 'sharded', tmp_path / 'again', ignore=shutil.ignore_patterns('checkpoint-4'))
    two(tmp_path, config, tmp_path / 'again', 'sharded', 'resume')
    resumed = load_file(tmp_path / 'again' / 'checkpoint-4/model.safetensors')
    assert [name for name, value in resumed.items() if not torch.equal(value, found[name])] == []

    run = load_run(tmp_path / 'sharded')
    stock, _ = fold_run(run)
    assert type(stock).__name__ == 'UNet2DModel'
    assert compare(run, stock)['float64']['model'] < 1e-10
