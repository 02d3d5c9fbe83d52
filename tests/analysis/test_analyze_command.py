"""The command on runs that were trained: detectors and diffusion models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command

SITES = 6  # residual branches of the backbone of the digits configs


def analyze(*arguments: object) -> Any:
    return command('analyze', *arguments)


@pytest.fixture(scope='module')
def detectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock detector, one with constant gates, one with gates that depend on the input."""
    pytest.importorskip('mmdet')
    from helpers.tiny_detection import STOCK, pictures, run, tiny

    folder = tmp_path_factory.mktemp('detectors')
    digits = pictures(folder)
    gates = dict(custom_hooks=[dict(type='asr_downstream.GatesHook', interval=2, images=4)])
    paths = {
        'stock': (STOCK, {}),
        'ASR': ('det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py', {}),
        'DIA': ('det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py', gates),
    }
    for name, (path, more) in paths.items():
        run(tiny(digits, path=path, **more), folder / name)
    return {name: folder / name for name in paths}


@pytest.mark.slow
@pytest.mark.det
def test_stripes_of_detectors(detectors: dict[str, Path], tmp_path: Path) -> None:
    done = analyze('stripes', detectors['ASR'], f'gated={detectors["DIA"]}', '--images', 8, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'stripes.json').read_text())
    assert (report['analysis'], report['images'], list(report['runs'])) == ('stripes', 8, ['ASR', 'gated'])
    constant, moving = report['runs'].values()
    assert {s['gates'] for s in constant['sites']} == {'constant'}
    assert [s['stripe_ratio'] for s in constant['sites']] == [0] * SITES
    assert constant['functional_test'] is None
    assert len(moving['sites']) == SITES
    for site in moving['sites']:
        assert site['gates'] == 'input-dependent'
        assert site['samples'] == 8
        assert site['stripe_ratio'] >= 0
        assert site['path'].startswith(site['stage'])
    assert max(site['stripe_ratio'] for site in moving['sites']) > 0
    assert moving['functional_test']['metric'] == 'AP'
    assert moving['functional_test']['replaced'] == SITES
    assert len(moving['over_training']) == 4
    assert moving['checkpoint'].endswith('epoch_2.pth')
    for name in ('ASR-gates', 'gated-gates', 'gated-over-training', 'stripe-ratios'):
        for kind in ('svg', 'png'):
            assert (tmp_path / f'{name}.{kind}').stat().st_size > 5000
    assert 'stripe ratio' in done.stdout
    assert 'outputs change by' in done.stdout


@pytest.mark.slow
@pytest.mark.det
def test_correlation_and_cost_of_detectors(detectors: dict[str, Path], tmp_path: Path) -> None:
    done = analyze('correlation', detectors['DIA'], '--images', 4, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / 'correlation.json').read_text())['runs'].values()
    assert [s['stage'] for s in run['stages']] == [f'backbone.layer{n}' for n in (1, 2, 3)]
    assert all(s['shared_unit'] and s['images'] == 4 and -1 <= s['mean'] <= 1 for s in run['stages'])
    done = analyze('cost', detectors['DIA'], detectors['ASR'], '--rounds', 1, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    for run in json.loads((tmp_path / 'cost.json').read_text())['runs'].values():
        assert len(run['sites']) == SITES
        assert run['model']['parameters'] > run['without_attention']['parameters']
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json', '.svg', '.png'}


@pytest.mark.slow
@pytest.mark.det
def test_noise_of_detectors(detectors: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_downstream.folding.analysis import noise

    monkeypatch.setattr(noise, 'STRENGTHS', {kind: sizes[:1] for kind, sizes in noise.STRENGTHS.items()})
    kinds = ['gaussian', 'batch-norm', 'fgsm']
    done = analyze('noise', detectors['stock'], detectors['ASR'], '--fold', '--kinds', *kinds, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'noise.json').read_text())
    arms = [(c['arm'], c['kind']) for run in report['runs'].values() for c in run['curves']]
    assert arms == [(arm, kind) for arm in ('stock', 'ASR', 'ASR, folded') for kind in kinds]
    growth = report['runs']['ASR']['growth']
    assert list(growth) == ['ASR', 'ASR, folded']
    for one, other in zip(growth['ASR']['blocks'], growth['ASR, folded']['blocks'], strict=True):
        assert one['growth'] == pytest.approx(other['growth'], rel=1e-3)
        assert one['largest'] < one['bound']
    assert (tmp_path / 'noise-growth.svg').is_file()


@pytest.mark.slow
@pytest.mark.det
def test_without_noise_a_detector_finds_the_same(detectors: dict[str, Path]) -> None:
    pytest.importorskip('mmdet')
    from asr_downstream.detection.analysis import attacked, with_boxes
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.evaluation.evaluate import detect
    from asr_downstream.folding.analysis.attacks import ATTACKS
    from asr_downstream.folding.analysis.noise import IMAGES, ImageNoise
    from asr_downstream.folding.analysis.runs import Wanted, open_run

    run = open_run(detectors['ASR'], Wanted(images=4))
    config = load_config(next(detectors['ASR'].glob('*.py')))
    run.model.bbox_head.test_cfg.score_thr = 0.0
    clean = detect(config, run.model, 'clean')[1]
    assert all(len(boxes) for boxes, _, _ in clean.values())

    def same(found: Any) -> bool:
        return all(torch.equal(a, b) for image in clean for a, b in zip(clean[image], found[image], strict=True))

    batch = next(iter(run.data()))
    features = run.step(run.model, batch)
    for kind in IMAGES:
        for strength in (0.0, 0.2):
            with run.changed(run.model, ImageNoise(kind, strength)):
                assert same(detect(config, run.model, 'noisy')[1]) is (strength == 0)
                assert torch.equal(run.step(run.model, batch)[0], features[0]) is (strength == 0)
    assert same(detect(config, run.model, 'clean')[1])

    seen = []

    def watch(loss: Any, images: torch.Tensor, black: Any, white: Any) -> torch.Tensor:
        found = ATTACKS['fgsm'](8 / 255, 0)(loss, images, black, white)
        with torch.no_grad():
            seen.append(
                (float(loss(images)), float(loss(found)), float(((found - images) / (white - black)).abs().max()))
            )
        return found

    assert run.attack(run.model, watch) >= 0
    for before, after, size in seen:
        assert math.isfinite(before)
        assert after > before
        assert size == pytest.approx(8 / 255, rel=1e-3)
    assert attacked(config, False, run.model, lambda loss, images, black, white: images) == run.metric.measure(
        run.model
    )
    sample = run.model.data_preprocessor(next(iter(run.data())), False)['data_samples'][0]
    sample.set_metainfo({'scale_factor': (0.5, 0.25)})
    scaled = with_boxes(sample, True).gt_instances.bboxes
    torch.testing.assert_close(scaled, sample.gt_instances.bboxes * torch.tensor([0.5, 0.25, 0.5, 0.25]))


@pytest.mark.det
def test_what_cannot_be_analysed_is_one_line(detectors: dict[str, Path], tmp_path: Path) -> None:
    for arguments, message in (
        (['stripes', detectors['stock']], 'has no gates to look at'),
        (['stripes', tmp_path], 'is no run that is known'),
        (['cost', detectors['DIA'], detectors['DIA']], 'given twice'),
        (['relations', detectors['DIA']], 'has no shipped models'),
        (['stripes', detectors['DIA'], '--kind', 'detektion'], "did you mean 'detection'"),
    ):
        done = analyze(*arguments, '--out', tmp_path / 'out')
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count('\n') == 1, done.stderr
    (tmp_path / 'lone.pth').write_bytes((detectors['DIA'] / 'epoch_2.pth').read_bytes())
    done = analyze('cost', tmp_path / 'lone.pth', '--out', tmp_path / 'out')
    assert 'has no config beside the weights; say which it is with --config' in done.stderr
    config = next(detectors['DIA'].glob('*.py'))
    done = analyze('cost', tmp_path / 'lone.pth', '--config', config, '--rounds', 1, '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_diffusion_model_by_timestep(tmp_path: Path) -> None:
    diffusion = pytest.importorskip('helpers.diffusion')
    run = diffusion.trained(tmp_path / 'se', plug=dict(type='Attention', attention=dict(type='SE', reduction=4)))
    done = analyze('stripes', run, '--images', 6, '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / 'out/stripes.json').read_text())['runs'].values()
    assert found['grouped_by'] == 'timestep'
    for site in found['sites']:
        assert site['samples'] == 60
        assert [g['value'] for g in site['groups']] == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
        assert {g['samples'] for g in site['groups']} == {6}
        assert 0 < site['explained_by_group'] < 1
    assert found['functional_test']['metric'] == 'denoising loss'
    assert found['functional_test']['before'] > 0
    assert (tmp_path / 'out' / f'{run.name}-by-timestep.svg').is_file()
    done = analyze('noise', run, '--out', tmp_path / 'out')
    assert done.returncode == 1
    assert 'noise is for detectors and classifiers' in done.stderr


def test_an_image_has_one_noise_at_all_timesteps(tmp_path: Path) -> None:
    diffusion = pytest.importorskip('helpers.diffusion')
    from asr_downstream.diffusion.analysis import NoisyImages
    from asr_downstream.diffusion.runs import load_run

    images = NoisyImages(load_run(diffusion.trained(tmp_path), True), 5)
    batches = list(images)
    assert len(batches) == len(images) == 2
    noise = torch.cat([batch['truth']['noise'] for batch in batches])
    assert torch.equal(noise[:10], noise[:1].expand(10, -1, -1, -1))
    assert not torch.equal(noise[0], noise[10])
    assert len(noise) == 50
