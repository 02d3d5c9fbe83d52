"""Shipping of diffusion models: what is shipped is stock, safe, and the same function."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.diffusion import (
    DIA,
    DIT,
    UNET,
    conditional_arguments,
    config_for,
    script,
    trained,
    vae,
    write_images,
    write_text_encoder,
)
from safetensors.torch import load_file

from asr_downstream import describe
from asr_downstream.diffusion.evaluation.encoder import train_encoder
from asr_downstream.diffusion.evaluation.fold import fold_run
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError, CheckpointError, FoldError
from asr_downstream.modules.seeds import mix


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run on digits."""
    from helpers.diffusion import ASR

    return trained(tmp_path_factory.mktemp('asr'), plug=ASR)


@pytest.fixture(scope='module')
def shipped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, folded and shipped."""
    out = tmp_path_factory.mktemp('shipped') / 'digits'
    fold_and_ship(load_run(run), out)
    return out


@pytest.fixture(scope='module')
def encoder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of the digits, hardly trained."""
    images = load_run(run, data=True).parts.images
    assert images is not None
    path = tmp_path_factory.mktemp('encoder') / 'encoder.safetensors'
    train_encoder(images, path, steps=20, workers=0)
    return path


def test_the_folded_pipeline_samples_where_this_package_is_not_installed(
    run: Path, shipped: Path, tmp_path: Path
) -> None:
    home = tmp_path / 'venv'
    venv.create(home, symlinks=True)
    site = next(home.glob('lib/python*/site-packages'))
    (site / 'libraries.pth').write_text(next(p for p in sys.path if p.endswith('site-packages')) + '\n')
    python = str(home / 'bin/python')
    absent = subprocess.run([python, '-Ic', 'import asr_downstream'], cwd=tmp_path, capture_output=True, text=True)
    assert 'No module named' in absent.stderr
    code = (
        'import sys, torch; from diffusers import DDPMPipeline\n'
        'pipeline = DDPMPipeline.from_pretrained(sys.argv[1])\n'
        'streams = [torch.Generator().manual_seed(int(s)) for s in sys.argv[3:]]\n'
        "images = pipeline(len(streams), streams, num_inference_steps=5, output_type='pt').images\n"
        'assert not any("asr_downstream" in name for name in sys.modules)\n'
        'torch.save(images, sys.argv[2])\n'
    )
    seeds = [str(mix(0, 'image', number)) for number in range(3)]
    done = subprocess.run(
        [python, '-Ic', code, str(shipped), str(tmp_path / 'images.pt'), *seeds],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = load_run(run)
    expected = generate(ours.parts.model, ours.parts, build_sampler('DDPM', ours.parts.scheduler), range(3), 5)
    found = torch.load(tmp_path / 'images.pt', weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.05


def test_what_is_shipped_is_stock_and_safe(run: Path, shipped: Path) -> None:
    files = {p.relative_to(shipped).as_posix() for p in shipped.rglob('*') if p.is_file()}
    assert files == {
        'README.md', 'fold_report.json', 'model_index.json', 'samples.png', 'scheduler/scheduler_config.json',
        'unet/config.json', 'unet/diffusion_pytorch_model.safetensors',
    }  # fmt: skip
    report = json.loads((shipped / 'fold_report.json').read_text())
    assert report['difference']['float64']['model'] < 1e-10
    assert report['difference']['float32']['model'] < 1e-4
    assert report['difference']['float32']['sample'] < 1e-3
    assert len(report['sites']) == 12
    stock = diffusers.UNet2DModel(**UNET)
    stock.load_state_dict(load_file(shipped / 'unet/diffusion_pytorch_model.safetensors'), strict=True)
    plugged = load_run(run).parts.model
    assert any(not torch.equal(v, plugged.state_dict()[k]) for k, v in stock.state_dict().items())
    card = (shipped / 'README.md').read_text()
    for part in ('library_name: diffusers', 'DDPMPipeline.from_pretrained', 'ASR', 'float64', 'squaredcos_cap_v2'):
        assert part in card
    assert not list(shipped.parent.glob('.*'))


def test_the_code_on_the_card_runs(shipped: Path) -> None:
    code = (shipped / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(shipped)), scope)
    assert len(scope['images']) == 16


def test_folders_of_others_are_not_overwritten(run: Path, shipped: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    for name in ('thesis.txt', 'fold_report.json'):  # a report that is not of this folder does not help
        (tmp_path / 'mine' / name).write_text('{"files": ["fold_report.json"]}')
        with pytest.raises(AsrError, match='holds .*thesis.txt, which this tool has not written'):
            fold_and_ship(load_run(run), tmp_path / 'mine')
        assert (tmp_path / 'mine/thesis.txt').is_file()
    before = (shipped / 'unet/diffusion_pytorch_model.safetensors').read_bytes()
    fold_and_ship(load_run(run), shipped)  # its own it replaces
    assert (shipped / 'unet/diffusion_pytorch_model.safetensors').read_bytes() == before


def test_a_model_that_differs_after_folding_is_not_shipped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asr_downstream.diffusion import export as shipping

    def wrong(of: Any, calibrate: Any) -> Any:
        folded, report = fold_run(of, calibrate)
        folded.conv_in.weight.data.mul_(1.01)
        return folded, report

    monkeypatch.setattr(shipping, 'fold_run', wrong)
    with pytest.raises(FoldError, match='differs by'):
        fold_and_ship(load_run(run), tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_folded_or_read_say_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is no run of diffusion/train.py'):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match='nothing to fold'):
        fold_run(load_run(trained(tmp_path / 'stock')))
    with pytest.raises(FoldError, match='depend on the input'):
        fold_and_ship(load_run(trained(tmp_path / 'dia', plug=DIA)), tmp_path / 'out')
    with pytest.raises(CheckpointError, match='has no ema.safetensors'):
        load_run(trained_without_average(tmp_path / 'raw'), ema=True)
    raw, average = (load_run(run, ema=e) for e in (False, True))
    assert (raw.ema, average.ema) == (False, True)
    assert raw.sha256 != average.sha256


def trained_without_average(folder: Path) -> Path:
    """A run without EMA."""
    return train(config_for(folder, max_train_steps=1, use_ema=False)).parent


def test_dia_ships_by_calibration(tmp_path: Path) -> None:
    path = trained(tmp_path / 'dia', plug=DIA)
    report = fold_and_ship(load_run(path, data=True), tmp_path / 'out', calibrate=8)
    assert report['difference'] is None
    assert report['calibration']['output_change'] > 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'out')
    assert not describe(pipeline.unet).sites
    assert 'by their mean over training images' in (tmp_path / 'out/README.md').read_text()


# kind -> model class of the shipped pipeline; None: diffusers has no pipeline, its parts are shipped
PIPELINES = {
    'class unet': None,
    'latent dit': 'DiTPipeline',
    'latent text': 'StableDiffusionPipeline',
    'pixel text': None,
}


def conditioned(folder: Path, kind: str) -> dict[str, Any]:
    """Settings of a conditioned run."""
    if kind == 'class unet':
        model = dict(type='UNet2DModel', **UNET, num_class_embeds=10)
        return dict(model=model, condition=dict(type='ClassLabels'))
    vae().save_pretrained(folder / 'vae')
    latent = {} if kind == 'pixel text' else {'vae': dict(pretrained_model_name_or_path=str(folder / 'vae'))}
    images = dict(path=str(write_images(folder / 'images')), resolution=16 if latent else 8)
    if kind == 'latent dit':
        return latent | dict(
            model=dict(type='DiTTransformer2DModel', **DIT),
            data=dict(type='ImageFolder', **images),
            condition=dict(type='ClassLabels', drop=0.1),
        )
    encoder = write_text_encoder(folder / 'encoder')
    lines = [f'{{"file_name": "cat/{n}.png", "text": "a cat"}}' for n in range(4)]
    (folder / 'images/metadata.jsonl').write_text('\n'.join(lines))
    data = dict(
        type='HubDataset', path='imagefolder', data_dir=images['path'], cache_dir=str(folder / 'cache'),
        caption_column='text', resolution=images['resolution'],
    )  # fmt: skip
    return latent | dict(
        model=dict(type='UNet2DConditionModel', **conditional_arguments(channels=4 if latent else 3)),
        data=data,
        condition=dict(type='Text', pretrained_model_name_or_path=str(encoder), prompts=['a cat', 'a dog']),
    )


@pytest.mark.parametrize(
    'kind', [pytest.param(k, marks=[pytest.mark.slow] if k == 'latent text' else []) for k in PIPELINES]
)
def test_conditioned_models_ship_as_the_pipeline_of_diffusers(tmp_path: Path, kind: str) -> None:
    from helpers.diffusion import ASR

    path = trained(tmp_path / 'run', **conditioned(tmp_path, kind), plug=ASR)
    out = tmp_path / 'out'
    report = fold_and_ship(load_run(path), out)
    assert report['difference']['float64']['model'] < 1e-10
    name = PIPELINES[kind]
    assert not list(out.rglob('*.bin')) + list(out.rglob('*.pt'))
    code = (out / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    assert report['pipeline'] is (name is not None)
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(out)), scope)
    assert len(scope['images']) == (4 if name is None else 1)
    if name is not None:
        assert type(scope['pipeline']).__name__ == name
        trained_with = load_run(path).parts.scheduler.config
        for key in ('clip_sample', 'steps_offset', 'prediction_type', 'beta_schedule'):  # pipelines rewrite some
            assert scope['pipeline'].scheduler.config[key] == trained_with[key]


def test_the_tool_folds_a_run_and_refuses_options_of_detectors(run: Path, tmp_path: Path, tool: Any) -> None:
    done = tool('fold', run, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'a pipeline of diffusers, model card' in done.stdout
    done = tool('fold', run, tmp_path / 'out', '--data-root', tmp_path)
    assert done.returncode == 2
    assert '--data-root is for a detector' in done.stderr


@pytest.mark.slow
def test_scripts_sample_and_evaluate(run: Path, encoder: Path, tmp_path: Path) -> None:
    options = ('--num-samples', 5, '--steps', 2, '--single', '--fold')
    done = script('diffusion/sample.py', run, '--out', tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert '5 images of step 1, averaged weights, DDIM, 2 steps' in done.stdout
    assert sorted(p.name for p in tmp_path.glob('*.png')) == [*(f'00000{n}.png' for n in range(5)), 'grid.png']
    options = ('--num-samples', 6, '--steps', 2, '--extractor', encoder, '--workers', 0)
    done = script('diffusion/evaluate.py', run, '--fold', *options)
    assert done.returncode == 0, done.stderr
    for part in ('unfolded', '│ folded', 'sampler DDIM, steps 2'):
        assert part in done.stdout
