"""Every run ships: without a plug, with replaced attention, conditioned; and its card says what is known, no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from helpers.diffusion import ASR, DIT, UNET, assert_refused, call, config_for, trained, vae, write_images
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from asr_downstream import describe
from asr_downstream.diffusion.card import shipped_results
from asr_downstream.diffusion.evaluation.results import Result, save_results
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.far.export import load_far


@pytest.fixture(scope='module')
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a plug."""
    return trained(tmp_path_factory.mktemp('stock'))


def front_matter(folder: Path) -> dict[str, Any]:
    """Metadata of a card."""
    head, _, rest = (folder / 'README.md').read_text().removeprefix('---\n').partition('\n---\n')
    assert rest.strip().startswith('#')
    return yaml.safe_load(head)


def code_of(folder: Path) -> dict[str, Any]:
    """What the code on a card leaves."""
    code = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(folder)), scope)
    return scope


def test_a_run_without_a_plug_ships_as_it_is(stock: Path, tmp_path: Path) -> None:
    done = call('tools/fold.py', stock, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'nothing to fold' in done.stdout
    shipped = load_file(tmp_path / 'out/unet/diffusion_pytorch_model.safetensors')
    state = load_run(stock).parts.model.state_dict()
    assert shipped.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in shipped.items())
    report = json.loads((tmp_path / 'out/fold_report.json').read_text())
    assert (report['sites'], report['plug']) == ([], None)
    assert report['difference']['float32']['model'] == report['difference']['float64']['model'] == 0
    assert 'nothing to fold' in (tmp_path / 'out/README.md').read_text()
    assert front_matter(tmp_path / 'out') == {  # nothing is invented
        'library_name': 'diffusers', 'pipeline_tag': 'unconditional-image-generation', 'tags': ['diffusion', 'unet'],
    }  # fmt: skip
    assert 'folded into the weights' not in (tmp_path / 'out/README.md').read_text()
    assert len(code_of(tmp_path / 'out')['images']) == 16
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / 'out').unet) is diffusers.UNet2DModel


def test_there_is_nothing_to_calibrate_without_a_plug(stock: Path, tmp_path: Path) -> None:
    done = call('tools/fold.py', stock, tmp_path / 'out', '--calibrate', 4)
    assert_refused(done, 'no plug')
    assert not (tmp_path / 'out').exists()


def test_a_start_is_taken_when_a_model_is_built_and_its_run_ships_as_it_is(tmp_path: Path) -> None:
    half = dict(type='Start', value=0.5)
    plain, halved = (build_model(config_for(tmp_path, plug=plug)) for plug in (None, half))
    ends = [row.path for row in describe(halved).starts]
    assert len(ends) >= 5
    for name, value in plain.state_dict().items():
        factor = 0.5 if name.rpartition('.')[0] in ends else 1
        assert torch.equal(halved.state_dict()[name], factor * value), name
    run = trained(tmp_path, plug=half, max_train_steps=2)
    loaded = load_run(run)
    weights = load_file(loaded.checkpoint / 'ema.safetensors')
    assert all(torch.equal(value, weights[name]) for name, value in loaded.parts.model.state_dict().items())
    report = fold_and_ship(loaded, tmp_path / 'out')
    assert (report['sites'], report['plug']) == ([], half)
    shipped = load_file(tmp_path / 'out/unet/diffusion_pytorch_model.safetensors')
    assert all(torch.equal(value, weights[name]) for name, value in shipped.items())


def test_a_run_with_replaced_attention_ships_for_this_package(tmp_path: Path) -> None:
    run = trained(tmp_path, replace=dict(type='FAR'))
    done = call('tools/fold.py', run, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'load_far' in done.stdout
    parts = load_run(run).parts
    with torch.no_grad():
        found, own = (m(**parts.inputs(2)).sample for m in (load_far(tmp_path / 'out'), parts.model))
    assert torch.equal(found, own)
    card = (tmp_path / 'out/README.md').read_text()
    assert 'load_far' in card
    assert front_matter(tmp_path / 'out')['library_name'] == 'asr_downstream'
    assert diffusers.DDPMScheduler.from_pretrained(tmp_path / 'out', subfolder='scheduler').config.beta_schedule == (
        'squaredcos_cap_v2'
    )


# Metadata -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_card_says_what_it_is_told(stock: Path, tmp_path: Path) -> None:
    options = (
        '--license',
        'apache-2.0',
        '--base-model',
        'google/ddpm-cat-256',
        '--dataset',
        'cifar10',
        '--tag',
        'a: b',
    )
    done = call('tools/fold.py', stock, tmp_path / 'out', *options)
    assert done.returncode == 0, done.stderr
    assert front_matter(tmp_path / 'out') == {
        'library_name': 'diffusers', 'pipeline_tag': 'unconditional-image-generation', 'license': 'apache-2.0',
        'base_model': 'google/ddpm-cat-256', 'datasets': ['cifar10'], 'tags': ['diffusion', 'unet', 'a: b'],
    }  # fmt: skip


def test_ids_of_the_hub_in_a_config_are_on_the_card(tmp_path: Path) -> None:
    from asr_downstream.diffusion.card import Metadata

    config = config_for(tmp_path)
    config.data = dict(type='HubDataset', path='user/birds', resolution=8)
    config.model = dict(type='UNet2DModel', pretrained_model_name_or_path='google/ddpm-cat-256')
    assert Metadata().of(config) == Metadata(base_model='google/ddpm-cat-256', datasets=('user/birds',))
    assert Metadata(base_model='mine', datasets=('b',)).of(config) == Metadata(base_model='mine', datasets=('b',))
    for path in (str(tmp_path), '/nowhere/model', './model', 'model'):  # of a disk, or nobody knows
        config.data.path = config.model.pretrained_model_name_or_path = path
        assert Metadata().of(config) == Metadata()


def test_the_numbers_of_what_is_shipped_are_on_the_card_for_machines(stock: Path, tmp_path: Path) -> None:
    run = load_run(stock)
    how = {'real': 'digits: train', 'images': 8, 'steps': 2, 'versions': {}}
    rows = [
        Result(run.folder.name, 'unfolded', run.step, run.sha256, how, {'fid': 3.5, 'kid': 0.25, 'parameters': 9}),
        Result(run.folder.name, 'unfolded', run.step, 'of other weights', how, {'fid': 1.0}),
    ]
    save_results(stock, rows)
    try:
        fold_and_ship(run, tmp_path / 'out')
    finally:
        (stock / 'evaluation.json').unlink()
    card = ModelCard.load(tmp_path / 'out/README.md')
    found = [(r.dataset_name, r.metric_type, r.metric_value, r.metric_args) for r in card.data.eval_results]
    args = {'images': 8, 'steps': 2}
    assert found == [('digits: train', 'fid', 3.5, args), ('digits: train', 'kid', 0.25, args)]
    assert card.data.eval_results[0].task_type == 'unconditional-image-generation'


@pytest.mark.parametrize(
    ('arms', 'samples', 'expected'),
    [
        (('unfolded', 'folded'), None, [(1.0, None)]),
        (('unfolded',), None, [(0.0, 'before folding')]),
        (('unfolded', 'calibrated on 4', 'calibrated on 8'), 8, [(2.0, None)]),
        (('unfolded', 'calibrated on 4'), 8, []),
    ],
)
def test_results_are_those_of_the_model_that_is_shipped(arms: Any, samples: Any, expected: Any) -> None:
    results = [Result('a', arm, 1, 'w', {'real': 'digits'}, {'fid': float(n)}) for n, arm in enumerate(arms)]
    calibration = None if samples is None else {'sites': [{'samples': samples}]}
    found = shipped_results(results, {'sites': [{}], 'calibration': calibration}, None)
    assert [(r.metric_value, (r.metric_args or {}).get('measured')) for r in found] == expected


# Conditions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', [pytest.param('UNet', marks=pytest.mark.slow), 'DiT'])
def test_the_card_of_classes_names_the_null_class_and_shows_guidance(tmp_path: Path, kind: str) -> None:
    images = write_images(tmp_path / 'images')
    if kind == 'UNet':
        model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3, 'num_class_embeds': 4})
        settings: dict[str, Any] = dict(model=model, data=dict(type='ImageFolder', path=str(images), resolution=8))
    else:
        vae().save_pretrained(tmp_path / 'vae')
        settings = dict(
            model=dict(type='DiTTransformer2DModel', **DIT),
            vae=dict(pretrained_model_name_or_path=str(tmp_path / 'vae')),
            data=dict(type='ImageFolder', path=str(images), resolution=16),
        )
    run = trained(tmp_path, **settings, plug=ASR, condition=dict(type='ClassLabels', drop=0.1), guidance_scale=3.0)
    done = call('tools/fold.py', run, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    card = (tmp_path / 'out/README.md').read_text()
    assert '| 3 | none: the null class' in card
    assert '| 1 | `dog` |' in card
    assert 'guidance = 3.0' in card
    for block in card.split('```python\n')[1:]:
        scope: dict[str, Any] = {'images': None}
        exec(block.split('```')[0].replace('THIS FOLDER', str(tmp_path / 'out')), scope)
        assert scope['images'] is not None
    assert scope['nothing'].tolist() == [3] * 4


# Comparisons ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_run_is_drawn_beside_a_long_one(tmp_path: Path, stock: Path) -> None:
    from PIL import Image

    long = train(config_for(tmp_path, max_train_steps=4, validation_steps=2, num_inference_steps=2, plug=None)).parent
    short = train(
        config_for(tmp_path / 'short', max_train_steps=2, validation_steps=2, num_inference_steps=2, plug=None)
    ).parent
    done = call('diffusion/compare.py', long, short, '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / 'out/samples.png') as both:
        width = both.width
    assert call('diffusion/compare.py', short, '--out', tmp_path / 'one').returncode == 0
    with Image.open(tmp_path / 'one/samples.png') as one:
        assert width > 1.5 * one.width, 'a column for step 4 too, which the short run has not'
    done = call('diffusion/compare.py', long, stock, '--out', tmp_path / 'mixed')
    assert done.returncode == 0, done.stderr
    assert 'samples.png' in done.stdout
    assert f'{stock.name}: has no samples' in done.stdout
