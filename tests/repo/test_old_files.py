"""Files of version 0.1.0, tests/fixtures: they load strictly, compute what they did, fold, and trainings go on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from diffusers import UNet2DModel
from helpers.detsets import tiny_set
from helpers.diffusion import assert_refused, call, rewrite
from mmengine.config import Config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asr_downstream import CheckpointError, FoldError, describe, far, fold, load_plugged, plug

OLD = ROOT / 'tests' / 'fixtures' / 'v0.1.0'
STEP = 2  # of the trainings


# What a file computes, in float64. tests/fixtures/make.py recorded with these functions. ------------------------------


def image(size: int = 16) -> Tensor:
    """An image ``(1, 3, size, size)`` without random numbers, whose streams may change."""
    return (torch.arange(3 * size * size).reshape(1, 3, size, size) ** 2 % 251 - 125).double() / 64


def grey(count: int = 2) -> Tensor:
    """Grey images ``(count, 1, 8, 8)``."""
    return (torch.arange(count * 64).reshape(count, 1, 8, 8) ** 2 % 101 - 50).double() / 32


def build_detector(folder: Path, epoch: int = 1) -> Any:
    """A detector from the config that its training wrote beside the checkpoint, with the weights of that."""
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    import asr_downstream.detection  # noqa: F401

    config = Config.fromfile(folder / f'{folder.name}.py')
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    content = torch.load(folder / f'epoch_{epoch}.pth', map_location='cpu', weights_only=False)
    model.load_state_dict(content['state_dict'], strict=True)
    return model.double().eval()


@torch.no_grad()
def heads(model: Any) -> Tensor:
    """Everything that the neck and the head of a detector give, in one row."""
    found = model.extract_feat(image()), *model(image(), None, mode='tensor')
    return torch.cat([level.flatten() for levels in found for level in levels])


def fold_detector(model: nn.Module) -> nn.Module:
    """A detector folded with two images."""
    return fold(model, calibrate=[image(), -image()], step=lambda m, x: m(x, None, mode='tensor'))[0]


def build_unet(checkpoint: Path, name: str = 'ema') -> nn.Module:
    """The UNet of a checkpoint of diffusion/train.py, from the config of its run."""
    config = Config.fromfile(checkpoint.parent / 'config.py')
    arguments = config.model.to_dict()
    assert arguments.pop('type') == 'UNet2DModel'
    model = UNet2DModel(**arguments)
    plug(model, config.plug)
    model.load_state_dict(load_file(checkpoint / f'{name}.safetensors'), strict=True)
    return nn.Module.double(model).eval()


@torch.no_grad()
def denoised(model: Any) -> Tensor:
    """What a UNet predicts at two timesteps."""
    return nn.Module.double(model).eval()(grey(), torch.tensor([3, 70])).sample


def fold_unet(model: nn.Module) -> nn.Module:
    """A UNet folded with two images."""
    return fold(model, calibrate=[grey()], step=lambda m, x: m(x, torch.tensor([3, 70])))[0]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Scores of a ViT."""
    return nn.Module.double(model).eval()(pixel_values=grey()).logits


# Held to it. ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Callable[[str], Path]:
    """Copy files of a kind: what is kept is never written to."""

    def copied(kind: str) -> Path:
        return shutil.copytree(OLD / kind, tmp_path / Path(kind).name)

    return copied


def expected(kind: str) -> dict[str, Tensor]:
    """What was recorded of a kind."""
    return load_file(OLD / kind / 'expected.safetensors')


def assert_equal(found: Tensor, wanted: Tensor, bound: float = 1e-6) -> None:
    """Relative to the largest value."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


def assert_differ(found: Tensor, other: Tensor, bound: float = 3e-4) -> None:
    """The negative control of `assert_equal`."""
    assert float((found - other).abs().max()) > bound * float(other.abs().max())


def assert_done(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """A command ended well and said all of ``parts``."""
    assert done.returncode == 0, done.stderr
    for part in parts:
        assert part in done.stdout


def break_key(path: Path) -> str:
    """Give the tensor of a gate or an LSTM in a file of weights another name; the name that it had."""
    safe = path.suffix == '.safetensors'
    content: Any = {'state_dict': load_file(path)} if safe else torch.load(path, weights_only=False)
    state = content['state_dict']
    key = next(key for key in state if any(f'.{part}.' in key for part in ('gate', 'shared_attention', 'mixer')))
    state[f'{key}_'] = state.pop(key)
    save_file(state, path) if safe else torch.save(content, path)
    return key


@pytest.mark.det
@pytest.mark.parametrize('name', ['asr', 'dia'])
def test_a_detector_computes_and_folds_as_it_did(name: str) -> None:
    model, was = build_detector(OLD / 'detector' / name), expected('detector')
    assert_equal(heads(model), was[name])
    if name == 'dia':
        assert_equal(heads(fold_detector(model)), was['dia.folded'])
        assert_differ(was['dia.folded'], was['dia'])
        with pytest.raises(FoldError, match='depend on the input'):
            fold(model)
    else:
        assert_equal(heads(fold(model)[0]), was['asr'])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'gate' in key or 'shared_attention' in key:
                parameter.mul_(1.1)
    assert_differ(heads(model), was[name])


@pytest.mark.det
def test_a_detector_is_folded_and_tested_by_the_tools(old: Callable[[str], Path], tmp_path: Path) -> None:
    from mmdet.registry import MODELS

    run, images = old('detector/asr'), tiny_set(tmp_path / 'set')
    files = run / 'asr.py', run / 'epoch_1.pth'
    assert_done(command('fold', *files, tmp_path / 'shipped.pth'), 'folded 4 sites', 'loads strictly')
    stock = MODELS.build(Config.fromfile(tmp_path / 'shipped.py').model)
    stock.load_state_dict(torch.load(tmp_path / 'shipped.pth')['state_dict'], strict=True)
    assert_equal(heads(stock.double().eval()), expected('detector')['asr'], 1e-5)
    done = command('test_det', *files, '--fold', '--data-root', images, '--work-dir', tmp_path / 'tested')
    assert_done(done, 'folded')
    assert (tmp_path / 'tested/test.json').is_file()
    run = old('detector/dia')
    options = '--calibrate', 3, '--no-evaluate', '--data-root', images
    assert_done(command('fold', run / 'dia.py', run / 'epoch_1.pth', tmp_path / 'dia.pth', *options), 'loads strictly')


@pytest.mark.det
def test_a_training_of_a_detector_goes_on_as_it_did(old: Callable[[str], Path], tmp_path: Path) -> None:
    run, images = old('detector/asr'), tiny_set(tmp_path / 'set')
    done = command('train_det', run / 'asr.py', '--work-dir', run, '--data-root', images, '--resume')
    assert_done(done, f'last checkpoint: {run}/epoch_2.pth')
    was = expected('detector')
    assert_equal(heads(build_detector(run, 2)), was['asr.resumed'], 1e-4)
    assert_differ(was['asr.resumed'], was['asr'])


@pytest.mark.det
def test_a_detector_with_another_key_is_refused(old: Callable[[str], Path], tmp_path: Path) -> None:
    run = old('detector/asr')
    key = break_key(run / 'epoch_1.pth')
    with pytest.raises(RuntimeError, match=re.escape(key)):
        build_detector(run)
    assert_refused(command('fold', run / 'asr.py', run / 'epoch_1.pth', tmp_path / 'shipped.pth'), key)
    assert not (tmp_path / 'shipped.pth').exists()


def test_a_unet_computes_and_folds_as_it_did() -> None:
    was, checkpoint = expected('diffusion'), OLD / 'diffusion' / f'checkpoint-{STEP}'
    model = build_unet(checkpoint)
    assert_equal(denoised(model), was['ema'])
    assert_equal(denoised(fold_unet(model)), was['folded'])
    assert_differ(was['folded'], was['ema'])
    assert_equal(denoised(build_unet(checkpoint, 'model')), was['raw'])
    assert_differ(was['raw'], was['ema'])


def test_a_run_samples_folds_and_shows_what_it_did(old: Callable[[str], Path], tmp_path: Path) -> None:
    run, was = old('diffusion'), expected('diffusion')
    done = call('diffusion/sample.py', run, '--num-samples', 4, '--steps', 5, '--single', '--out', tmp_path / 'sampled')
    assert_done(done, f'4 images of step {STEP}, averaged weights')
    pictures = np.stack([np.array(Image.open(path)) for path in sorted((tmp_path / 'sampled').glob('0*.png'))])
    assert np.abs(pictures.astype(int) - was['pictures'].numpy().astype(int)).max() <= 1
    done = command('fold', run, tmp_path / 'shipped', '--calibrate', 16)
    assert_done(done, 'folded 5 sites of UNet2DModel')
    assert_equal(denoised(UNet2DModel.from_pretrained(tmp_path / 'shipped/unet')), was['shipped'], 1e-5)
    (result,) = json.loads((OLD / 'diffusion/evaluation.json').read_text())
    assert_done(call('diffusion/evaluate.py', run, '--show'), f'{result["numbers"]["fid"]:.3f}', 'asr-downstream 0.1.0')


def test_a_run_of_diffusion_goes_on_as_it_did(old: Callable[[str], Path]) -> None:
    run, was = old('diffusion'), expected('diffusion')
    done = call('diffusion/train.py', run / 'config.py', '--output-dir', run, '--resume')
    assert_done(done, f'resumed from {run}/checkpoint-{STEP}', f'last checkpoint: {run}/checkpoint-4')
    assert_equal(denoised(build_unet(run / 'checkpoint-4')), was['resumed'], 1e-4)
    assert_differ(was['resumed'], was['ema'])
    before, after = ((folder / 'log.jsonl').read_text().splitlines() for folder in (OLD / 'diffusion', run))
    assert [json.loads(row)['step'] for row in after] == [json.loads(row)['step'] for row in before] == [1, 2, 3, 4]


def test_a_run_with_another_key_is_refused(old: Callable[[str], Path], tmp_path: Path) -> None:
    run = old('diffusion')
    checkpoint = run / f'checkpoint-{STEP}'
    key = break_key(checkpoint / 'ema.safetensors')
    with pytest.raises(RuntimeError, match=re.escape(key)):
        build_unet(checkpoint)
    assert_refused(call('diffusion/sample.py', checkpoint, '--out', tmp_path / 'sampled'), 'ema.safetensors')
    rewrite(checkpoint, 'ema', load_file(checkpoint / 'ema.safetensors'))  # and its hash
    assert_refused(call('diffusion/sample.py', run, '--out', tmp_path / 'sampled'), key)


@pytest.mark.parametrize('name', ['teacher', 'FAR-100', 'FAR-50'])
def test_a_family_computes_what_it_did(name: str) -> None:
    model = far.load_far(OLD / 'far/run/shipped' / name)
    assert_equal(logits(model), expected('far')[name])
    units = sum(row.units for row in far.describe(model).rows)
    assert units == {'teacher': 0, 'FAR-100': 16, 'FAR-50': 8}[name]


def test_a_family_is_evaluated_as_it_was(old: Callable[[str], Path]) -> None:
    run = old('far') / 'run'
    was = json.loads((run / 'evaluation.json').read_text())['models']
    (run / 'evaluation.json').unlink()
    assert_done(command('evaluate_far', run, '--rounds', 1), 'FAR-100', 'FAR-50')
    found = json.loads((run / 'evaluation.json').read_text())['models']
    assert found.keys() == was.keys()
    assert found['teacher']['gmacs'] > was['teacher']['gmacs'], 'its attention was left out then'
    for name, numbers in was.items():
        for key in ('accuracy', 'parameters', 'units', *(['gmacs'] if name != 'teacher' else [])):
            assert found[name][key] == pytest.approx(numbers[key], rel=1e-9), (name, key)
    assert len({numbers['accuracy'] for numbers in was.values()}) == len(was)


def test_a_distillation_goes_on_as_it_did(old: Callable[[str], Path]) -> None:
    folder = old('far')
    student = folder / 'run/shipped/FAR-100'
    shutil.rmtree(student)
    done = command('distill_far', folder / 'tiny.py', '--output-dir', folder / 'run', '--resume')
    assert_done(done, 'teacher: finished before', f'resumed from {folder}/run/distill/checkpoint-196')
    assert_equal(logits(far.load_far(student)), expected('far')['FAR-100'], 1e-4)
    before, after = (load_file(folder / f'run/distill/checkpoint-{step}/model.safetensors') for step in (196, 200))
    assert any(not torch.equal(before[key], value) for key, value in after.items())


def test_a_student_with_another_key_is_refused(old: Callable[[str], Path]) -> None:
    folder = old('far/run/shipped/FAR-50')
    key = break_key(folder / 'asr_downstream.safetensors')
    with pytest.raises(CheckpointError, match='was changed since it was written'):
        far.load_far(folder)
    content = json.loads((folder / 'far.json').read_text())
    (folder / 'far.json').write_text(json.dumps({k: v for k, v in content.items() if k != 'files'}))
    with pytest.raises(CheckpointError, match=re.escape(key)):
        far.load_far(folder)


LOADED = {'unet': (load_plugged, denoised), 'vit': (load_plugged, logits), 'far': (far.load_far, denoised)}


@pytest.mark.parametrize('name', LOADED)
def test_a_saved_model_computes_and_folds_as_it_did(name: str) -> None:
    load, output = LOADED[name]
    model, was = load(OLD / 'saved' / name), expected('saved')[name]
    assert_equal(output(model), was)
    sites = len(describe(model).sites)
    assert sites == {'unet': 3, 'vit': 2, 'far': 0}[name]
    assert len(far.describe(model).rows) == {'unet': 1, 'vit': 0, 'far': 1}[name]
    if sites:
        folded, _ = fold(model)
        assert_equal(output(folded), was)
        assert not describe(folded).sites


@pytest.mark.parametrize('name', ['unet', 'vit'])
def test_a_saved_model_with_another_key_is_refused(name: str, old: Callable[[str], Path]) -> None:
    folder = old(f'saved/{name}')
    key = break_key(folder / 'asr_downstream.safetensors')
    with pytest.raises(CheckpointError, match=re.escape(key)):
        load_plugged(folder)
