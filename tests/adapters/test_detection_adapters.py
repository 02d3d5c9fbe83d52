"""Adapters of detectors of MMDetection: backbones, checkpoints with their configs, commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.adapters import call, differing, same, train
from helpers.backbones import ASR, BACKBONES, IDS, in_eval, plugged, tiny
from helpers.tiny_detection import as_file, pictures, run
from helpers.tiny_detection import tiny as tiny_config
from mmdet.registry import MODELS

from asr_downstream import apply_gates, fold, list_gates, save_gates, unload
from asr_downstream.detection.config import load_config
from asr_downstream.detection.export import fold_checkpoint
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.folding.adapters.base import BASE_FILE, remember

STOCK = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
PLUGGED = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'


@pytest.mark.parametrize(('backbone', 'end', 'count'), BACKBONES, ids=IDS)
def test_applying_gives_the_fold_to_the_bit(tmp_path: Path, backbone: dict[str, Any], end: str, count: int) -> None:
    stock = in_eval(randomise(tiny(backbone)))
    model = plugged(backbone)
    model.load_state_dict(stock.state_dict(), strict=False)
    remember(model)
    in_eval(train(model))
    adapter = save_gates(model, tmp_path / 'a.safetensors')
    assert len(adapter.sites) == count
    assert all(at.endswith(end) for at in adapter.sites)
    applied = apply_gates(stock, tmp_path / 'a.safetensors')
    assert differing(applied, in_eval(fold(model)[0])) == []
    assert len(differing(applied, stock)) == 2 * count
    unload(model)
    assert differing(model, stock) == []


def test_a_resnet_50_is_121_kb(tmp_path: Path) -> None:
    model = MODELS.build(dict(type='asr_downstream.ResNet', depth=50, plug=ASR))
    remember(model)
    adapter = save_gates(in_eval(model), tmp_path / 'a.safetensors')
    assert adapter.numbers == 15_104
    assert 8 * 15_104 == 120_832 < (tmp_path / 'a.safetensors').stat().st_size < 128_000


@pytest.fixture
def training(tmp_path: Path) -> tuple[Path, Path]:
    """A base of MMDetection, and the checkpoint of a training of gates and heads that began with it."""
    stock = randomise(build_detector(load_config(ROOT / STOCK, needs_data=False)))
    meta = {'dataset_meta': {'classes': tuple('0123456789')}, 'epoch': 12}
    torch.save({'state_dict': stock.state_dict(), 'meta': meta}, tmp_path / 'base.pth')
    model = build_detector(load_config(ROOT / PLUGGED, needs_data=False))
    model.load_state_dict(stock.state_dict(), strict=False)
    remember(model, ['bbox_head.retina_cls'], tmp_path)
    train(model, ('bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'))
    meta = {'dataset_meta': {'classes': tuple('abcdefghij')}, 'epoch': 4}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, tmp_path / 'epoch_4.pth')
    return tmp_path / 'base.pth', tmp_path / 'epoch_4.pth'


def test_a_training_becomes_an_adapter_and_the_adapter_a_stock_checkpoint(
    training: tuple[Path, Path], tmp_path: Path
) -> None:
    base, checkpoint = training
    done = call('save', ROOT / PLUGGED, checkpoint, tmp_path / 'a.safetensors')
    assert done.returncode == 0, done.stderr
    adapter = list_gates(tmp_path / 'a.safetensors')
    assert {*adapter.heads} == {'bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'}
    assert adapter.about == {'classes': list('abcdefghij')}
    assert (tmp_path / 'a.safetensors').stat().st_size < base.stat().st_size / 4

    for config in (STOCK, PLUGGED):
        words = ('apply', base, tmp_path / 'a.safetensors', tmp_path / 'out/night.pth', '--config', ROOT / config)
        done = call(*words)
        assert done.returncode == 0, done.stderr
        assert 'loads strictly into the stock config' in done.stdout
        assert 'asr_downstream' not in (tmp_path / 'out/night.py').read_text()
    fold_checkpoint(load_config(ROOT / PLUGGED, needs_data=False), checkpoint, tmp_path / 'folded/night.pth')
    ours, theirs = (torch.load(tmp_path / folder / 'night.pth') for folder in ('out', 'folded'))
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    assert all(same(ours['state_dict'][name], value) for name, value in theirs['state_dict'].items())
    assert ours['meta']['dataset_meta'] == theirs['meta']['dataset_meta']

    night = tmp_path / 'out/night.pth'  # its config lies beside it
    done = call('apply', night, tmp_path / 'a.safetensors', tmp_path / 'again.pth', '--any-base')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'again.py').is_file()


def test_refusals_of_detectors(training: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = training
    call('save', ROOT / PLUGGED, checkpoint, tmp_path / 'a.safetensors')
    call('apply', base, tmp_path / 'a.safetensors', tmp_path / 'night.pth', '--config', ROOT / STOCK)
    (tmp_path / BASE_FILE).unlink()
    adapter, out = tmp_path / 'a.safetensors', tmp_path / 'out.pth'
    retinanet50 = ROOT / 'det_configs/retinanet/retinanet_r50_fpn_1x_coco.py'
    heads = ('--heads', 'bbox_head.retina_cls')
    cases = [
        (('save', ROOT / PLUGGED, checkpoint, tmp_path / 'b.safetensors'), 'its base is not known'),
        (('save', ROOT / PLUGGED, checkpoint, tmp_path / 'b.safetensors', '--base', base), '2 of'),
        (('save', ROOT / STOCK, base, tmp_path / 'b.safetensors'), 'has no gates'),
        (('apply', checkpoint, adapter, out, '--config', ROOT / STOCK), 'was made for'),
        (('apply', base, adapter, out, '--config', retinanet50), 'was made for another model than the config builds'),
        (('apply', base, adapter, tmp_path / 'night.pth', '--config', tmp_path / 'night.py'), 'would overwrite'),
    ]
    for words, message in cases:
        done = call(*words)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert not out.exists()
    done = call('save', ROOT / PLUGGED, checkpoint, tmp_path / 'b.safetensors', '--base', base, *heads)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'b.safetensors').read_bytes() == adapter.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('learns', ['gates', ['gates+norms', 'bbox_head.*']], ids=str)
def test_a_training_with_learns_from_the_base_to_the_stock_checkpoint(tmp_path: Path, learns: Any) -> None:
    digits, base = pictures(tmp_path), tmp_path / 'base.pth'
    torch.save({'state_dict': randomise(build_detector(tiny_config(digits))).state_dict()}, base)
    options = {'model.backbone.plug.preserve': True, 'load_from': str(base), 'learns': learns}
    config = tiny_config(digits, path=PLUGGED, **options)
    checkpoint, file = run(config, tmp_path / 'run'), as_file(config, tmp_path)
    assert (tmp_path / 'run' / BASE_FILE).is_file()
    done = call('save', file, checkpoint, tmp_path / 'a.safetensors')
    assert done.returncode == 0, done.stderr
    done = call('apply', base, tmp_path / 'a.safetensors', tmp_path / 'out/night.pth', '--config', file)
    assert done.returncode == 0, done.stderr
    fold_checkpoint(load_config(file, needs_data=False), checkpoint, tmp_path / 'folded/night.pth')
    ours, theirs, stock = (
        torch.load(tmp_path / name)['state_dict'] for name in ('out/night.pth', 'folded/night.pth', 'base.pth')
    )
    assert ours.keys() == theirs.keys() == stock.keys()
    assert all(same(ours[name], value) for name, value in theirs.items())
    changed = {name for name, value in stock.items() if not same(ours[name], value)}
    adapter = list_gates(tmp_path / 'a.safetensors')
    sites = {f'{at}.{name}' for at in adapter.sites for name in ('weight', 'bias')}
    assert changed
    assert changed <= {*sites, *adapter.heads}
    assert bool(adapter.heads) == (learns != 'gates')
