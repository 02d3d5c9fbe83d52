"""Trainings of classifiers: from a config to the shipped stock model, through the library and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, randomise
from helpers.classification import TINY, config_of, evaluated, run_of, write_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn

from asr_downstream import describe, fold, plug
from asr_downstream.classification.config import SCHEMA, load_config
from asr_downstream.classification.evaluate import evaluate_run
from asr_downstream.classification.export import load_classifier, save_classifier
from asr_downstream.classification.models import CLASSIFIERS, build_model
from asr_downstream.classification.plugs import PLUGS
from asr_downstream.classification.task import Classification
from asr_downstream.engine.classification import accuracy
from asr_downstream.engine.optim import build_optimiser, build_schedule
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, CheckpointError, DataError, PlugError
from asr_downstream.models.resnet_cifar import ResNet, resnet, resnet164

CONFIGS = sorted((ROOT / 'tools/cls_configs').glob('*.py'))
ARMS = ('stock', 'asr-se', 'start', 'asr-se+se')


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Arm -> its run, and what was measured."""
    found = {}
    for arm in ARMS:
        folder = tmp_path_factory.mktemp('runs') / arm
        found[arm] = folder, evaluated(folder, plug=PLUGS[arm])
    return found


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('arm', ['stock', 'asr-se', 'start'])
def test_what_ships_is_the_stock_model_with_the_accuracy_of_the_trained_one(runs: Any, arm: str) -> None:
    run, found = runs[arm]
    assert found == json.loads((run / 'evaluation.json').read_text())
    assert found['accuracy']['plugged'] == found['accuracy']['folded']
    assert found['images'] == 180
    assert found['training_images'] == 200
    stock = resnet(depth=8, width=4)
    stock.load_state_dict(load_file(run / 'shipped/model.safetensors'), strict=True)
    task = Classification(config_of(run, plug=PLUGS[arm]))
    assert accuracy(stock.eval(), task) == found['accuracy']['folded']
    trained = build_model(task.config, 10)
    trained.load_state_dict(load_file(run / 'checkpoint-6/model.safetensors'))
    assert describe(trained).parameters == found['parameters']['plugged'] - found['parameters']['folded']
    torch.testing.assert_close(stock(images()), trained.eval()(images()), atol=1e-4, rtol=1e-4)
    again = load_classifier(run / 'shipped')
    assert type(again) is ResNet
    assert torch.equal(again(images()), stock(images()))


def test_folding_was_needed(runs: Any) -> None:
    """The negative control: the weights of the plugged model, without its gates, compute something else."""
    run, found = runs['asr-se']
    assert 0 < found['difference'] < 1e-5
    stock = resnet(depth=8, width=4)
    stock.load_state_dict(load_file(run / 'checkpoint-6/model.safetensors'), strict=False)
    assert (stock.eval()(images()) - load_classifier(run / 'shipped')(images())).abs().max() > 1e-2


def test_gates_that_depend_on_the_input_ship_when_they_are_calibrated(runs: Any) -> None:
    run, found = runs['asr-se+se']
    assert found['accuracy']['folded'] is None
    assert not (run / 'shipped').exists()
    task = Classification(config_of(run, plug=PLUGS['asr-se+se']))
    again = evaluate_run(task, run / 'checkpoint-6', calibrate=32)
    assert again['accuracy']['plugged'] == found['accuracy']['plugged']
    assert 0 <= again['accuracy']['folded'] <= 1
    assert again['calibration']['sites']
    assert type(load_classifier(run / 'shipped')) is ResNet
    assert evaluate_run(task, run / 'checkpoint-6')['accuracy']['folded'] is None
    assert not (run / 'shipped').exists(), 'it would be of other gates than the numbers beside it'


def test_the_log_has_accuracies_and_rates_that_fall(runs: Any) -> None:
    run, found = runs['asr-se']
    assert [row['step'] for row in found['validations']] == [3, 6]
    assert found['validations'][-1]['accuracy'] == found['accuracy']['plugged']
    assert found['validations'][0]['epoch'] == pytest.approx(3 * 32 / 200)
    rows = read_log(run / 'log.jsonl', having='loss')
    assert [row['lr'] for row in rows] == pytest.approx([0.1, 0.01, 0.01])


def test_the_card_and_the_config_say_what_it_is(runs: Any) -> None:
    run, found = runs['start']
    content = json.loads((run / 'shipped/config.json').read_text())
    assert content['model'] == {'type': 'ResNet', 'depth': 8, 'width': 4, 'num_classes': 10}
    assert content['training']['plug'] == {'type': 'Start', 'value': 0.5}
    assert content['classes'] == list('0123456789')
    card = ModelCard.load(run / 'shipped/README.md')
    [result] = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (found['accuracy']['folded'], 'Digits')
    assert str(run) not in card.text
    block = card.text.split('```python\n')[1].split('```')[0].replace('FOLDER', str(run / 'shipped'))
    names: dict[str, Any] = {}
    exec(block, names)
    assert not names['model'].training


@pytest.mark.parametrize('kind', ['files', 'memory'])
def test_a_run_is_the_same_wherever_images_are_kept(runs: Any, tmp_path: Path, kind: str) -> None:
    run_of(tmp_path, images_in=kind)
    expected, found = (load_file(folder / 'checkpoint-6/model.safetensors') for folder in (runs['stock'][0], tmp_path))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_goes_on_where_it_was_stopped_and_a_complete_one_is_measured_again(runs: Any, tmp_path: Path) -> None:
    run_of(tmp_path, plug=PLUGS['start'], max_train_steps=3, lr_scheduler_kwargs=dict(milestones=[3]))
    task, last = run_of(tmp_path, 'latest', plug=PLUGS['start'])  # a Start that is not taken twice
    expected = load_file(runs['start'][0] / 'checkpoint-6/model.safetensors')
    for name, value in load_file(last / 'model.safetensors').items():
        assert torch.equal(value, expected[name]), name
    task, again = run_of(tmp_path, 'latest', plug=PLUGS['start'])
    assert again == last
    assert evaluate_run(task, again)['accuracy'] == runs['start'][1]['accuracy']
    with pytest.raises(CheckpointError, match=r"was trained with plug=\{'type': 'Start', 'value': 0.5\}"):
        run_of(tmp_path, 'latest', plug=PLUGS['asr-se'])


def test_the_plugged_model_has_the_weights_of_the_stock_one(tmp_path: Path) -> None:
    stock, gated, halved = (build_model(config_of(tmp_path, plug=PLUGS[arm]), 10) for arm in ('stock', 'se', 'start'))
    for name, value in stock.state_dict().items():
        assert torch.equal(gated.state_dict()[name], value)
        half = 0.5 if '.bn2.' in name and name.endswith(('weight', 'bias')) else 1
        assert torch.equal(halved.state_dict()[name], half * value), name


def test_every_plug_of_the_table_fits_and_those_of_constant_gates_fold() -> None:
    for name, spec in PLUGS.items():
        model = resnet(depth=8)
        if spec is not None:
            plug(model, spec)
        sites = describe(model).sites
        assert len(sites) == (0 if name == 'stock' or name.startswith('start') else 3), name
        constant = name.startswith(('asr', 'layerscale', 'sigmoid')) and name != 'asr-se+se'
        assert all(site.folds == constant for site in sites), name
        if sites and constant:
            randomise(model.eval())
            folded, _ = fold(model)
            torch.testing.assert_close(folded(images()), model(images()), atol=1e-3, rtol=1e-3)
        if 'start' in name:
            assert {row.value for row in describe(model).starts} == {spec['value']}


# Config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_says_its_command_and_fits(path: Path) -> None:
    assert path.read_text().startswith(f'# python tools/train_cls.py tools/cls_configs/{path.name}')
    config = load_config(path, {'data': dict(type='Digits', resolution=8)}, plug='asr-se')
    assert config.plug == PLUGS['asr-se']
    config.data = dict(type='Digits', resolution=8)
    config.images_per_class = None
    config.model['depth'] = {'ResNet': 11 if config.model.get('block') == 'bottleneck' else 8}[config.model['type']]
    task = Classification(config)
    schedule = build_schedule(build_optimiser(task.parameter_groups(task.config), task.config), task.config)
    steps, an_epoch = task.config.max_train_steps, 1617 / 128
    drops = [s for s in range(1, steps) if schedule.lr_lambdas[0](s) < 0.99 * schedule.lr_lambdas[0](s - 1)]
    epochs = [8] if path.stem.startswith('resnet20_cifar10-10k') else [81, 122]
    assert drops == pytest.approx([e * an_epoch for e in epochs], abs=1)
    assert task.config.validation_steps == 13


def test_a_plug_by_name_takes_the_place_of_that_of_the_config_and_options_change_it(tmp_path: Path) -> None:
    path = write_config(tmp_path, plug=dict(type='ASR', attention=dict(type='IE')))
    assert load_config(path).plug.attention.type == 'IE'
    assert load_config(path, plug='stock').plug is None
    assert load_config(path, {'plug.value': 0.25}, plug='start').plug == {'type': 'Start', 'value': 0.25}
    assert PLUGS['start'] == {'type': 'Start', 'value': 0.5}
    with pytest.raises(AsrError, match="--plug asr-sse: is not known; did you mean 'asr-se'"):
        load_config(path, plug='asr-sse')


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'model': None}, AsrError, "has no 'model'; add model = dict"),
        (
            {'model': dict(type='ResNet', depth=21)},
            AsrError,
            "block='basic' it is 6 n \\+ 2, such as 20",
        ),
        ({'model': dict(type='ResNet', depth=20, block='basik')}, AsrError, "did you mean 'basic'"),
        ({'model': dict(type='ResNet', depth=20, init='hee')}, AsrError, "did you mean 'he'"),
        ({'model': dict(type='ResNet', dept=20)}, AsrError, "takes no 'dept'; did you mean 'depth'"),
        ({'model': dict(type='ResNext')}, AsrError, "type='ResNext' is not known"),
        ({'model': dict(type='ResNet', num_classes=7)}, AsrError, 'num_classes=7, but the data has 10 classes'),
        ({'images_per_class': 500}, DataError, 'images_per_class=500'),
        ({'images_in': 'gpu'}, AsrError, "images_in='gpu' is not known"),
        ({'image_mean': [0.5]}, AsrError, 'give both, with 3 numbers each'),
        ({'plug': dict(type='ASR', attention=dict(type='SEE'))}, PlugError, "did you mean 'SE'"),
        ({'epoch': 3}, AsrError, "'epoch' is not a key of a classification config; did you mean 'epochs'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_of(tmp_path / 'run', **settings)
    assert not [p for p in (tmp_path / 'run').glob('*') if p.name != '.lock']


def test_a_class_of_ones_own_is_trained_and_shipped(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, num_classes: int, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, width, 3)
            self.norm = nn.BatchNorm2d(width)
            self.head = nn.Linear(width, num_classes)

        def forward(self, pictures: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(pictures)).relu().mean((2, 3)))

    CLASSIFIERS.register_module(module=Own)
    try:
        settings = dict(model=dict(type='Own', width=8), channels=1, plug=dict(PLUGS['asr-se'], sites=['norm']))
        found = evaluated(tmp_path, **settings)
        assert found['accuracy']['plugged'] == found['accuracy']['folded']
        shipped = load_classifier(tmp_path / 'shipped')
        assert type(shipped) is Own
        assert 'load_classifier' in (tmp_path / 'shipped/README.md').read_text()
    finally:
        CLASSIFIERS.module_dict.pop('Own')
    with pytest.raises(AsrError, match="model: type='Own' is not known"):
        load_classifier(tmp_path / 'shipped')


# Models ---------------------------------------------------------------------------------------------------------------


def test_resnets_by_depth_are_those_of_the_papers() -> None:
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(resnet(164, 100, 'bottleneck')) == count(resnet164()) == 1_727_284
    assert count(resnet(20)) == 272_474  # 0.27 million
    for depth, blocks in ((20, 3), (32, 5), (56, 9), (110, 18)):
        assert len(resnet(depth, width=2).layer1) == blocks
    he, default = resnet(20, init='he'), resnet(20)
    assert float(he.conv1.weight.std()) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
    assert float(default.conv1.weight.std()) == pytest.approx((1 / 3 / 27) ** 0.5, rel=0.1)


# Shipping -------------------------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = dict(
    model=dict(type='ResNet', depth=8, width=4), classes=list('0123456789'), resolution=8, channels=3, image_mean=None,
    image_std=None, training=dict(plug=None, seed=0, step=1), accuracy=0.5, data='Digits', images=180,
)  # fmt: skip


def test_a_folder_of_something_else_is_not_replaced_and_gates_do_not_ship(tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(AsrError, match='exists and is no shipped classifier'):
        save_classifier(resnet(8, width=4), tmp_path / 'mine', FACTS)
    gated = resnet(8, width=4)
    plug(gated, PLUGS['asr-se'])
    with pytest.raises(AsrError, match='has gates; fold it first'):
        save_classifier(gated, tmp_path / 'shipped', FACTS)
    assert not (tmp_path / 'shipped').exists()
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = resnet(8, width=4).eval()
        save_classifier(model, tmp_path / 'shipped', FACTS)
        assert torch.equal(load_classifier(tmp_path / 'shipped')(images()), model(images()))


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(resnet(8, width=4), tmp_path / 'shipped', FACTS)
    with pytest.raises(CheckpointError, match='no such folder'):
        load_classifier(tmp_path / 'none')
    content = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(content.replace('"classes"', '"clases"'))
    with pytest.raises(CheckpointError, match="config.json: is damaged \\('classes'\\)"):
        load_classifier(folder)
    (folder / 'config.json').write_text('{}')
    with pytest.raises(CheckpointError, match='has no config.json of a shipped classifier'):
        load_classifier(folder)
    (folder / 'config.json').write_text(content)
    with (folder / 'model.safetensors').open('ab') as file:
        file.write(b'x')
    with pytest.raises(CheckpointError, match='model.safetensors: is missing, damaged'):
        load_classifier(folder)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_trains_measures_and_ships(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, max_train_steps=2, validation_steps=0), tmp_path / 'out'
    dry = command('train_cls', config, '--plug', 'start', '--dry-run', '--output-dir', out)
    assert dry.returncode == 0, dry.stderr
    for text in ('layer1.0.bn2', 'Start(0.5)', '200 images to train on, 180 held out', 'sgd, 0.1, step', '2 of 32'):
        assert text in dry.stdout
    assert not out.exists()
    done = command('train_cls', config, '--plug', 'start', '--seed', 3, '--output-dir', out)
    assert done.returncode == 0, done.stderr
    assert f'shipped: {out / "shipped"}' in done.stdout
    found = json.loads((out / 'evaluation.json').read_text())
    assert (found['seed'], found['plug'], found['validations']) == (3, {'type': 'Start', 'value': 0.5}, [])
    again = command('train_cls', config, '--plug', 'start', '--seed', 3, '--output-dir', out)
    assert again.returncode == 1
    assert 'has checkpoints of an earlier run' in again.stderr
    resumed = command('train_cls', config, '--plug', 'start', '--seed', 3, '--output-dir', out, '--resume')
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / 'evaluation.json').read_text())['accuracy'] == found['accuracy']


def test_the_command_says_that_gates_did_not_fold(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_train_steps=1, validation_steps=0)
    done = command('train_cls', config, '--plug', 'se', '--output-dir', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'its gates depend on the input' in done.stdout
    assert '--calibrate N' in done.stdout


def test_runs_are_named_by_config_plug_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dry = command('train_cls', write_config(tmp_path), '--plug', 'asr-se', '--seed', 2, '--dry-run')
    assert 'work_dirs/cls/tiny_asr-se_seed2' in dry.stdout
    assert 'work_dirs/cls/tiny_seed0' in command('train_cls', write_config(tmp_path), '--dry-run').stdout


def test_defaults_are_the_recipe_of_the_papers() -> None:
    config = SCHEMA.from_dict({'model': TINY['model']}, 'x')
    found = config.optimizer, config.learning_rate, config.momentum, config.nesterov, config.weight_decay
    assert found == ('sgd', 0.1, 0.9, False, 1e-4)
    assert config.train_batch_size == 128
