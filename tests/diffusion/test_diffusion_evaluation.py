"""Evaluation of diffusion models: folded equals unfolded, numbers carry their provenance."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.diffusion import (
    DIA,
    UNET,
    config_for,
    script,
    trained,
    write_images,
)

from asr_downstream.diffusion.evaluation.compare import compare_runs, plain_ticks, plt
from asr_downstream.diffusion.evaluation.encoder import load_encoder, train_encoder
from asr_downstream.diffusion.evaluation.evaluate import Plan, evaluate_runs
from asr_downstream.diffusion.evaluation.fold import compare, fold_run
from asr_downstream.diffusion.evaluation.metrics import Distances, build_extractor
from asr_downstream.diffusion.evaluation.results import Result, read_results, save_results, tables
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError, CheckpointError, DataError, FoldError

QUICK = Plan(num_samples=12, steps=3, extractor='', batch_size=12, workers=0)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run on digits."""
    from helpers.diffusion import ASR

    return trained(tmp_path_factory.mktemp('asr'), plug=ASR)


@pytest.fixture(scope='module')
def encoder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of the digits, hardly trained."""
    images = load_run(run, data=True).parts.images
    assert images is not None
    path = tmp_path_factory.mktemp('encoder') / 'encoder.safetensors'
    train_encoder(images, path, steps=20, workers=0)
    return path


def test_distances_are_those_of_the_formulas() -> None:
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(400, 6)), generator.normal(0.3, 1.2, size=(300, 6))
    found = Distances(torch.tensor(real), ('fid', 'kid')).to(torch.tensor(fake))
    from scipy.linalg import sqrtm

    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    means = real.mean(0) - fake.mean(0)
    fid = means @ means + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert found['fid'] == pytest.approx(fid, rel=1e-6)

    def kernel(x: Any, y: Any) -> Any:
        return (x @ y.T / 6 + 1) ** 3

    def unbiased(x: Any, y: Any) -> float:
        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        return (
            (xx.sum() - np.trace(xx)) / (n * (n - 1))
            + (yy.sum() - np.trace(yy)) / (m * (m - 1))
            - 2 * kernel(x, y).mean()
        )

    assert found['kid'] == pytest.approx(unbiased(real, fake), abs=3 * found['kid_std'] / 10 + 1e-3)
    again = Distances(torch.tensor(real), ('fid', 'kid')).to(torch.tensor(fake))
    assert again == found
    with pytest.raises(DataError, match='too few'):
        Distances(torch.tensor(real), ('fid',)).to(torch.tensor(fake[:1]))
    with pytest.raises(AsrError, match="'is'"):
        Distances(torch.tensor(real), ('is',))


def test_folded_and_unfolded_have_the_same_numbers(run: Path, encoder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('evaluation.json')))
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'exact'})
    unfolded, folded = evaluate_runs([run], plan)
    assert folded.numbers['fid'] == pytest.approx(unfolded.numbers['fid'], rel=1e-3)
    assert folded.numbers['pixels'] < 0.1
    assert folded.numbers['parameters'] < unfolded.numbers['parameters']
    assert folded.numbers['gmacs'] == pytest.approx(unfolded.numbers['gmacs'], rel=0.01)
    assert folded.provenance == unfolded.provenance
    assert {r.arm for r in read_results(run)} == {'unfolded', 'folded'}
    assert (run / 'evaluation/folded-1.png').is_file()


@pytest.mark.slow
def test_the_same_again_replaces_and_another_seed_is_beside(run: Path, encoder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('evaluation.json')))
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'exact'})
    unfolded, _ = evaluate_runs([run], plan)
    evaluate_runs([run], plan)
    assert len(read_results(run)) == 2
    other = evaluate_runs([run], Plan(**{**vars(plan), 'seed': 1, 'fold': None}))
    assert other[0].numbers['fid'] != unfolded.numbers['fid']
    text = tables(read_results(run))
    assert text.count('FID') == 2  # another seed, another table
    assert 'seed 0' in text
    assert 'seed 1' in text


@pytest.mark.slow
def test_stock_and_plugged_runs_are_evaluated_together(run: Path, encoder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / 'run'))
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'exact'})
    found = evaluate_runs([trained(tmp_path / 'stock'), run], plan)
    assert [result.arm for result in found] == ['unfolded', 'unfolded', 'folded']
    assert len({str(result.provenance) for result in found}) == 1


@pytest.mark.slow
def test_other_images_are_another_provenance(tmp_path: Path, encoder: Path) -> None:
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    paths = []
    for number in (1, 2):
        folder = write_images(tmp_path / str(number) / 'train')
        if number == 2:
            shutil.copy(folder / 'cat/0.png', folder / 'cat/1.png')
        data = dict(type='ImageFolder', path=str(folder), resolution=8)
        paths.append(trained(tmp_path / f'run{number}', model=model, data=data))
    a, b = evaluate_runs(paths, Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    assert a.provenance['real'] != b.provenance['real']
    alone = evaluate_runs(paths[1:], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))[0]
    assert alone.numbers['fid'] == b.numbers['fid']


@pytest.mark.slow
def test_runs_are_compared_in_pictures_and_tables(run: Path, encoder: Path, tmp_path: Path) -> None:
    options = dict(max_train_steps=4, checkpointing_steps=2, validation_steps=2, num_validation_images=4)
    other = train(config_for(tmp_path / 'other', num_inference_steps=2, **options)).parent
    evaluate_runs([other / 'checkpoint-2', other], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    text = compare_runs([other], tmp_path / 'out')
    assert text.count('unfolded') == 2
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'curves.png', 'samples.png', 'results.json'}
    content = json.loads((tmp_path / 'out/results.json').read_text())
    assert [row['step'] for row in content['results']] == [2, 4]
    assert content['loss']['run'][-1][0] == 4
    compare_runs([other, run], tmp_path / 'both')  # the second has no samples: those of the first are drawn
    assert (tmp_path / 'both/samples.png').is_file()
    with pytest.raises(AsrError, match='has no log.jsonl'):
        compare_runs([tmp_path], tmp_path / 'none')


@pytest.mark.slow
def test_calibrated_folding_is_evaluated_beside_the_model(tmp_path: Path, encoder: Path) -> None:
    path = trained(tmp_path, plug=DIA)
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'calibrated', 'calibrate': 8})
    unfolded, calibrated = evaluate_runs([path], plan)
    assert calibrated.arm == 'calibrated on 8'
    assert calibrated.numbers['pixels'] > unfolded.numbers.get('pixels', 0)
    assert calibrated.numbers['parameters'] < unfolded.numbers['parameters']


@pytest.mark.parametrize('key', ['images', 'sampler', 'steps', 'seed', 'ema', 'extractor', 'versions'])
def test_numbers_of_different_provenance_never_share_a_table(tmp_path: Path, key: str) -> None:
    base = {
        'images': 100, 'sampler': 'DDIM', 'steps': 50, 'seed': 0, 'ema': True, 'extractor': 'e', 'versions': {'t': '1'},
    }  # fmt: skip
    changed = {**base, key: {'t': '2'} if key == 'versions' else 'other'}
    results = [Result('r', arm, 1, 'w', p, {'fid': 1.0}) for arm, p in (('a', base), ('b', changed), ('c', base))]
    save_results(tmp_path, results)
    assert read_results(tmp_path) == results
    parts = tables(results).split('\n\n')
    assert len(parts) == 2
    assert '│ a ' in parts[0]
    assert '│ c ' in parts[0]
    assert '│ b ' in parts[1]


def test_the_encoder_learns_and_is_the_same_each_time(run: Path, encoder: Path, tmp_path: Path) -> None:
    images = load_run(run, data=True).parts.images
    assert images is not None
    again = train_encoder(images, tmp_path / 'e.safetensors', steps=20, workers=0)
    assert again.identity == load_encoder(encoder).identity
    assert again.about['task'] == 'classes'
    longer = train_encoder(images, tmp_path / 'l.safetensors', steps=60, workers=0)
    assert longer.about['accuracy_held_out'] > 0.6  # chance: 0.1
    assert longer.identity != again.identity
    images.source.labels = None
    assert train_encoder(images, tmp_path / 'r.safetensors', steps=2, workers=0).about['task'] == 'rotations'
    (tmp_path / 'l.safetensors').write_bytes((tmp_path / 'l.safetensors').read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='damaged|is no encoder'):
        load_encoder(tmp_path / 'l.safetensors')


def test_inception_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AsrError, match='no such file'):
        build_extractor(f'inception:{tmp_path}/nothing.pth')
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(AsrError, match='needs torch-fidelity and torchvision'):
            build_extractor('inception')


@pytest.mark.slow
def test_real_images_that_cannot_be_decoded_are_refused(tmp_path: Path, encoder: Path) -> None:
    folder = write_images(tmp_path / 'images')
    (folder / 'dog/1.png').write_text('hello')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    data = dict(type='ImageFolder', path=str(folder), resolution=8, max_bad_share=0.5)
    path = trained(tmp_path / 'run', model=model, data=data)
    with pytest.raises(DataError, match=r'dog/1\.png: cannot be decoded'):
        evaluate_runs([path], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    done = script('diffusion/evaluate.py', path, '--extractor', encoder, '--steps', 2)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {folder}/dog/1.png: cannot be decoded')  # by a worker


def test_compare_sees_a_difference(run: Path) -> None:
    ours = load_run(run)
    folded, _ = fold_run(ours)
    assert compare(ours, folded)['float32']['model'] < 1e-5
    folded.down_blocks[0].resnets[0].conv2.weight.data.mul_(1.1)
    with pytest.raises(FoldError, match='in float32'):
        compare(ours, folded)


@pytest.mark.parametrize('losses', [[0.34, 0.12], [2.0, 2.1], [30.0, 0.02]])
def test_axes_of_losses_have_plain_numbers(losses: list[float]) -> None:
    figure, axis = plt.subplots()
    axis.plot(losses)
    axis.set_yscale('log')
    plain_ticks(axis)
    figure.canvas.draw()
    texts = [text.get_text() for text in axis.get_yticklabels(which='both') if text.get_text()]
    plt.close(figure)
    assert 3 <= len(texts) <= 8
    assert all(re.fullmatch(r'[\d.]+', text) for text in texts)
