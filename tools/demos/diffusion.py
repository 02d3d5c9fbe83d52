"""The first part of the demo: two UNets of one seed, stock and ASR(SE), trained on digits, folded, compared.

Before any training a table shows what folding does, with gates drawn at random.

The folded pipeline is loaded and sampled by plain diffusers, in a process that refuses this package.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from handbook.figures import Figures, measure
from mmengine.config import Config
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from asr_downstream.console.text import render
from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.evaluation.compare import draw_arms
from asr_downstream.diffusion.evaluation.encoder import train_encoder
from asr_downstream.diffusion.evaluation.evaluate import forward_gmacs, real_batches
from asr_downstream.diffusion.evaluation.fold import stock_of
from asr_downstream.diffusion.evaluation.metrics import Distances, features_of
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.runs import Run, load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.config import CONFIG_FILE
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import write_json
from asr_downstream.measure import cost
from asr_downstream.measure.versions import versions
from asr_downstream.modules.seeds import mix
from asr_downstream.plugging.describe import describe

__all__ = ['run_demo']

ARMS = {'stock': 'unet-w32_digits', 'ASR(SE)': 'unet-w32-asr-se_digits'}
FOLDED = 'ASR(SE), folded'
STEPS = 800
IMAGES, INFERENCE_STEPS = 256, 25
ENCODER_STEPS = 250
PICTURES = 40


def run_demo(out: Path, configs: Path, tools: Path, steps: int = STEPS) -> dict[str, Any]:
    """Run everything and write ``out/summary.json``, ``out/samples.png`` and the pipeline ``out/shipped``.

    Args:
        out: folder to write; an earlier demo there is replaced.
        configs: folder of the configs.
        tools: folder of the command line tools, for the process that may not import this package.
        steps: optimiser steps of each arm.

    Returns:
        The summary; ``summary['checks']`` says what held.
    """
    begin = time.perf_counter()
    print(forms_table(three_forms(configs)), flush=True)
    for name in ARMS.values():
        if (out / name / CONFIG_FILE).is_file():
            shutil.rmtree(out / name)  # of an earlier demo
    seconds: dict[str, float] = {}
    for number, (arm, name) in enumerate(ARMS.items(), 1):
        config = demo_config(configs / f'{name}.py', out / name, steps)
        print(f'{number}/5  training {arm}: {steps} steps of {config.train_batch_size} digits, {name}', flush=True)
        start = time.perf_counter()
        train(config)
        seconds[arm] = time.perf_counter() - start

    print('3/5  folding, and sampling where asr_downstream cannot be imported', flush=True)
    runs = {arm: load_run(out / name, data=True) for arm, name in ARMS.items()}
    report = fold_and_ship(runs['ASR(SE)'], out / 'shipped')
    images: dict[str, Tensor] = {}
    images[FOLDED] = sample_elsewhere(tools, out / 'shipped', out / 'elsewhere.safetensors')

    print('4/5  sampling', flush=True)
    for arm, run in runs.items():
        sampler = build_sampler('DDIM', run.parts.scheduler)
        images[arm] = generate(run.parts.model, run.parts, sampler, range(IMAGES), INFERENCE_STEPS)

    print('5/5  an encoder for FID, and the distances to the real digits', flush=True)
    real = runs['stock'].parts.images
    assert real is not None
    encoder = train_encoder(real, out / 'encoder.safetensors', steps=ENCODER_STEPS, workers=0)
    pixels = torch.cat(list(real_batches(real, workers=0)))
    distances = Distances(features_of(encoder, [pixels]), ('fid', 'kid'))
    numbers = {arm: numbers_of(arm, runs, distances, features_of(encoder, [images[arm]])) for arm in [*ARMS, FOLDED]}
    noise = {'fid': distances.to(features_of(encoder, [torch.rand(IMAGES, *pixels.shape[1:])]))['fid']}
    apart = float((images[FOLDED] - images['ASR(SE)']).abs().max()) * 255
    summary = {
        'arms': numbers,
        'noise': noise,
        'largest_pixel_difference': apart,
        'difference': report['difference'],
        'encoder': encoder.about,
        'training_seconds': {arm: round(s, 1) for arm, s in seconds.items()},
        'sites': len(describe(runs['ASR(SE)'].parts.model).sites),
        'checks': {
            'both_learn_FID_below_a_tenth_of_noise': all(numbers[arm]['fid'] < noise['fid'] / 10 for arm in ARMS),
            'folded_images_equal_unfolded_within_half_a_grey_level': apart < 0.5,
            'folded_has_the_parameters_of_stock': numbers[FOLDED]['parameters'] == numbers['stock']['parameters'],
        },
        'images': IMAGES,
        'inference_steps': INFERENCE_STEPS,
        'training_steps': steps,
        'versions': versions(),
        'wall_seconds': round(time.perf_counter() - begin, 1),
    }
    captions = {arm: f'FID {n["fid"]:.2f}' for arm, n in numbers.items()}
    draw_arms(
        out / 'samples.png',
        {'real': pixels[:PICTURES]} | {arm: images[arm][:PICTURES] for arm in [*ARMS, FOLDED]},
        captions | {FOLDED: f'{captions[FOLDED]}, by plain diffusers'},
    )
    write_json(out / 'summary.json', summary)
    print(table(numbers, noise['fid'], steps))
    print(
        f'ASR(SE), folded and sampled by plain diffusers, against unfolded: grey levels differ by at most {apart:.1e} '
        f'of 255, on {IMAGES} images\n'
        f'{out / "shipped"}: a DDPMPipeline, with a model card\n{out / "samples.png"}: digits\n'
        f'{out / "summary.json"}: all numbers\n{summary["wall_seconds"]:.0f} s in all'
    )
    return summary


def three_forms(configs: Path) -> Figures:
    """The UNet of the demo, stock, plugged with gates drawn at random, and folded: the same weights three times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy = torch.randn(8, 1, 8, 8)
        stock, plugged = (build_model(load_config(configs / f'{name}.py', {}, None)) for name in ARMS.values())
        plugged.load_state_dict(stock.state_dict(), strict=False)
        steps = torch.full((8,), 100)
        site = ('', '', '')
        return measure('UNet', '8 x 8 pixels', site, stock, plugged, lambda model: model(noisy, steps).sample)


def forms_table(figures: Figures) -> str:
    """One column a form."""
    found = Table('', *figures.forms, title='before training: the same weights three times, random gates')
    for column in found.columns[1:]:
        column.justify = 'right'
    forms = list(figures.forms.values())
    found.add_row('parameters', *(f'{form.parameters:,}' for form in forms))
    found.add_row('GMACs', *(f'{form.gmacs:.4f}' for form in forms))
    found.add_row('operators of a forward', *(f'{form.operators}' for form in forms))
    found.add_row('stock class loads its weights', *('yes' if form.loads else 'no' for form in forms))
    found.add_row('output differs from plugged by', *(f'{form.difference:.1e}' for form in forms))
    return render(found)


def demo_config(path: Path, out: Path, steps: int) -> Config:
    """Config of an arm: short, one checkpoint, no pictures on the way."""
    options = {
        'max_train_steps': steps,
        'lr_warmup_steps': min(100, steps // 10),
        'checkpointing_steps': steps,
        'validation_steps': 0,
        'report_to': [],
    }
    config = load_config(path, options)
    config.output_dir = str(out)
    return config


def sample_elsewhere(tools: Path, folder: Path, out: Path) -> Tensor:
    """Sample a pipeline with plain diffusers, in a process that refuses this package.

    Raises:
        AsrError: that process failed.
    """
    seeds = [mix(0, 'image', number) for number in range(IMAGES)]
    command = [sys.executable, '-W', 'ignore', tools / 'sample_stock.py', folder, '--out', out]
    command += ['--steps', INFERENCE_STEPS, '--seeds', *seeds]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AsrError(f'plain diffusers could not sample {folder}: {done.stderr.strip().splitlines()[-1]}')
    return load_file(out)['images']


def numbers_of(arm: str, runs: dict[str, Run], distances: Distances, features: Tensor) -> dict[str, float]:
    """Distances and cost of an arm."""
    run = runs['stock' if arm == 'stock' else 'ASR(SE)']
    model = stock_of(run) if arm == FOLDED else run.parts.model
    return {
        **distances.to(features),
        'parameters': cost.parameters(model),
        'gmacs': forward_gmacs(run.parts, model),
    }


def table(numbers: dict[str, dict[str, float]], noise: float, steps: int) -> str:
    """One column an arm."""
    title = f'digits, {steps} steps, {IMAGES} images, DDIM {INFERENCE_STEPS} steps (FID of noise: {noise:.0f})'
    found = Table('', *numbers, title=title)
    for column in found.columns[1:]:
        column.justify = 'right'
    for name, form in (('fid', '{:.3f}'), ('kid', '{:.4f}'), ('parameters', '{:,}'), ('gmacs', '{:.4f}')):
        heads = {'fid': 'FID, own encoder', 'kid': 'KID, own encoder', 'gmacs': 'GMACs'}
        found.add_row(heads.get(name, name), *(form.format(arm[name]) for arm in numbers.values()))
    return render(found)
