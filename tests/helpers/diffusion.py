"""Tiny diffusion models, configs and data for the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from conftest import ROOT, randomise
from mmengine.config import Config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from asr_downstream.console import cli
from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.trackers import read_log
from helpers.engine import seal

UNET = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
    norm_num_groups=8,
)
ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))


def write_config(folder: Path, **settings: Any) -> Path:
    """Write a config that trains a tiny UNet on digits; ``settings`` are merged in, ... leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        'model': dict(type='UNet2DModel', **UNET),
        'plug': ASR,
        'data': dict(type='Digits', resolution=8),
        'noise_scheduler': dict(type='DDPMScheduler', num_train_timesteps=100, beta_schedule='squaredcos_cap_v2'),
        'train_batch_size': 8,
        'max_train_steps': 6,
        'learning_rate': 2e-3,
        'lr_warmup_steps': 2,
        'dataloader_num_workers': 0,
        'checkpointing_steps': 3,
        'validation_steps': 0,
        'logging_steps': 1,
        'report_to': [],
        **settings,
    }
    path = folder / 'config.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in content.items() if value is not ...))
    return path


def config_for(folder: Path, **settings: Any) -> Config:
    """Config of a run in ``folder / 'run'``."""
    config = load_config(write_config(folder, **settings))
    config.output_dir = str(folder / 'run')
    return config


def conditional_unet(width: int = 24) -> Any:
    """UNet with cross-attention."""
    return diffusers.UNet2DConditionModel(**conditional_arguments(width))


def conditional_arguments(width: int = 24, channels: int = 4) -> dict[str, Any]:
    """Arguments of a UNet with cross-attention: 4 transformer blocks."""
    return dict(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
    )


DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=3,
    norm_num_groups=8,
)


def vae(channels: int = 3) -> Any:
    """VAE that halves the resolution."""
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=('DownEncoderBlock2D', 'DownEncoderBlock2D'),
        up_block_types=('UpDecoderBlock2D', 'UpDecoderBlock2D'),
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=4,
    )


def write_images(folder: Path, classes: tuple[str, ...] = ('cat', 'dog', 'owl'), each: int = 4, size: int = 16) -> Path:
    """Write PNG images of random pixels, a folder a class."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = random.integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{number}.png')
    return folder


def write_text_encoder(folder: Path, width: int = 24) -> Path:
    """Write a pipeline folder with a tiny CLIP tokenizer and text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord('a'), ord('z') + 1)]
    tokens = ['<|startoftext|>', '<|endoftext|>', *letters, *(f'{c}</w>' for c in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    tokenizer.save_pretrained(folder / 'tokenizer')
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / 'text_encoder')
    return folder


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and average of a checkpoint."""
    found = load_file(checkpoint / 'model.safetensors')
    if (checkpoint / 'ema.safetensors').is_file():
        found |= {f'ema.{k}': v for k, v in load_file(checkpoint / 'ema.safetensors').items()}
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of a log."""
    return [(row['step'], row['loss']) for row in read_log(run / 'log.jsonl')]


def assert_same(one: Path, other: Path) -> None:
    """Assert equal weights, bit by bit."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def command(*arguments: object) -> list[str]:
    """Command line of a training in one process."""
    return [sys.executable, '-W', 'ignore', 'diffusion/train.py', *map(str, arguments)]


def launch(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a training in processes of its own."""
    words = command(*arguments)
    if processes > 1:
        words[:3] = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def trained(folder: Path, **settings: Any) -> Path:
    """A run of one step whose weights, average and gates are random."""
    last = train(config_for(folder, **{'max_train_steps': 1, 'plug': None, **settings}))
    run = load_run(last)
    for name in ('model', 'ema'):
        randomise(run.parts.model)
        for parameter in run.parts.model.parameters():
            parameter.data.mul_(0.7)  # random networks amplify
        rewrite(last, name, run.parts.model.state_dict())
    return last.parent


def rewrite(checkpoint: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Replace a file of weights, and its entry in the manifest."""
    save_file(state, checkpoint / f'{name}.safetensors')
    seal(checkpoint)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of diffusion/."""
    command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``diffusion/sample.py`` or another script as its command line does, in this process."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(lambda argv: module.main([*map(str, arguments)]))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess([name], code, out.getvalue(), err.getvalue())


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert that a command ended with one line of error that says all of ``parts``."""
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert (done.returncode, len(lines)) == (1, 1), (done.returncode, done.stdout[-500:], done.stderr)
    assert 'Traceback' not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


class Exact(nn.Module):
    """Predicts the noise of a Gaussian in closed form.

    Args:
        alphas: cumulated, of the schedule.
        deviation: of the Gaussian.
        wrong: what the noise is multiplied by.
    """

    def __init__(self, alphas: torch.Tensor, deviation: float, wrong: float = 1.0) -> None:
        super().__init__()
        self.alphas = nn.Parameter(alphas)
        self.variance, self.wrong = deviation**2, wrong

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return type('Output', (), {'sample': self.wrong * x * (1 - a).sqrt() / (self.variance * a + 1 - a)})
