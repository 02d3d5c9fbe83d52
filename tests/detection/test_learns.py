"""Detectors in which only a part learns: what changes, what the optimiser holds, and that runs go on as they would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.learning_detection import ASR, DIA, FLIPS, STATISTICS, AtStart, is_norm, plugged
from helpers.tiny_detection import (
    Dead,
    DieAt,
    SignalAt,
    as_file,
    assert_same,
    run,
    tiny,
    weights,
)
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel

from asr_downstream.console.stopping import Stopped
from asr_downstream.detection.config import load_config, partly_stock_config, stock_config
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.detection.training import train as training
from asr_downstream.detection.training.launch import join
from asr_downstream.detection.training.learning import META, LearningRunner, learning_of
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.folding.adapters.base import BASE_FILE
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.learning.restrict import restrict

IN = {
    'gates': lambda name: bool(GATES.search(name)),
    'norms': is_norm,
    'gates+norms': lambda name: bool(GATES.search(name)) or is_norm(name),
    'bias': lambda name: name.endswith('bias') and not GATES.search(name),
    'bbox_head.*': lambda name: name.startswith('bbox_head.'),
}
FAST = ('gates', 'norms')


@pytest.mark.parametrize('path', [ASR, pytest.param(DIA, marks=pytest.mark.slow)])
@pytest.mark.parametrize('learns', [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in IN])
def test_only_what_was_named_changes(digits: Path, stock: Path, tmp_path: Path, path: str, learns: str) -> None:
    start = AtStart()
    checkpoint = run(plugged(digits, stock, path, learns=learns), tmp_path, hooks=(start,))
    parameters = dict(start.model.named_parameters())
    expected = {name for name in parameters if IN[learns](name)}
    after = weights(checkpoint)
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    assert changed & parameters.keys() <= expected
    assert not any(after[name].any() for name in expected - changed)  # zeros at first, behind a unit that is never on
    assert len(expected & changed) > len(expected) / 2
    homes = {name.rpartition('.')[0] for name in expected}
    assert {n for n in changed if n.endswith(STATISTICS)} == {
        n for n in after if n.endswith(STATISTICS) and n.rpartition('.')[0] in homes
    }
    held = [p for group in start.optimiser.param_groups for p in group['params']]
    assert {id(p) for p in held} == {id(parameters[name]) for name in expected}
    assert {id(p) for p in start.optimiser.state} == {id(p) for p in held}
    assert len(read_checkpoint(checkpoint)['optimizer']['state']) == len(expected)
    assert all(p.grad is None for name, p in parameters.items() if name not in expected)
    base = weights(stock)
    assert all(torch.equal(start.state[name], value) for name, value in base.items())


@pytest.mark.slow
def test_all_is_what_it_was_without_the_key(digits: Path, stock: Path, tmp_path: Path) -> None:
    first = run(plugged(digits, stock), tmp_path / 'a')
    other = run(plugged(digits, stock, learns='all'), tmp_path / 'b')
    assert_same(other, first)
    assert META not in read_checkpoint(other)['meta']
    assert not (tmp_path / 'b' / BASE_FILE).exists()


def test_the_start_is_the_base_bit_for_bit_also_in_training_mode(digits: Path, stock: Path) -> None:
    base, _ = load_detector(tiny(digits), stock)
    config = plugged(digits, stock, learns='gates')
    model = build_detector(config)
    model.load_state_dict(weights(stock), strict=False)
    x = torch.randn(2, 3, 96, 96)
    expected = base.extract_feat(x)
    free = copy.deepcopy(model).train()
    assert not all(torch.equal(a, b) for a, b in zip(free.extract_feat(x), expected, strict=True))
    restrict(model, learning_of(config, model))
    for found, wanted in zip(model.train().extract_feat(x), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize('stop', [DieAt, pytest.param(SignalAt, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'options',
    [
        pytest.param({'learns': 'gates'}, marks=pytest.mark.slow),
        {'learns': ['gates+norms', 'bbox_head.*'], 'ema': True},
    ],
)
def test_a_resumed_training_is_the_one_without_the_stop(
    digits: Path, stock: Path, tmp_path: Path, stop: Any, options: dict[str, Any]
) -> None:
    def config() -> Any:
        made = plugged(digits, stock, learns=options['learns'], **FLIPS)
        if 'ema' in options:
            training.average(made, momentum=0.1)
        return made

    whole = run(config(), tmp_path / 'whole')
    with pytest.raises((Dead, Stopped)):
        run(config(), tmp_path / 'parts', hooks=(stop(4),))
    before = (tmp_path / 'parts' / BASE_FILE).read_text()
    resumed = run(config(), tmp_path / 'parts', 'auto')
    assert_same(resumed, whole)
    assert (tmp_path / 'parts' / BASE_FILE).read_text() == before == (tmp_path / 'whole' / BASE_FILE).read_text()


@pytest.mark.slow
def test_another_choice_does_not_resume(digits: Path, stock: Path, tmp_path: Path) -> None:
    run(plugged(digits, stock, learns='gates', **{'train_cfg.max_epochs': 1}), tmp_path)
    for learns in ('norms', 'all', ['gates', 'norms']):
        with pytest.raises(CheckpointError, match=r"was trained with learns=\['gates'\], the config says"):
            run(plugged(digits, stock, learns=learns), tmp_path, 'latest')


@pytest.mark.slow
def test_gradients_are_accumulated(digits: Path, stock: Path, tmp_path: Path) -> None:
    start = AtStart()
    config = plugged(digits, stock, learns='gates', **{'optim_wrapper.accumulative_counts': 2})
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    assert changed == {name for name, _ in start.model.named_parameters() if GATES.search(name)}


@pytest.mark.slow
def test_averaged_weights_have_no_copies_of_what_is_frozen(digits: Path, stock: Path, tmp_path: Path) -> None:
    class Averages(Hook):
        priority = 'LOWEST'

        def after_train(self, runner: Any) -> None:
            hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
            self.shared = {
                name: p.data_ptr() == dict(runner.model.named_parameters())[name].data_ptr()
                for name, p in hook.ema_model.module.named_parameters()
            }
            self.averaged = set(hook.ema_model.avg_parameters)

    config = plugged(digits, stock, learns='gates')
    training.average(config, momentum=0.1)
    seen, start = Averages(), AtStart()
    checkpoint = run(config, tmp_path, hooks=(seen, start))
    gates = {name for name in seen.shared if GATES.search(name)}
    assert gates
    assert {name for name, shared in seen.shared.items() if not shared} == gates
    assert gates <= seen.averaged
    content = read_checkpoint(checkpoint)
    live, mean = content['ema_state_dict'], content['state_dict']
    assert sum(not torch.equal(mean[name], live[f'module.{name}']) for name in gates) > len(gates) / 2
    for name, value in weights(stock).items():
        assert torch.equal(content['state_dict'][name], value), name
        assert torch.equal(content['ema_state_dict'][f'module.{name}'], value), name


@pytest.mark.slow
def test_statistics_run_where_that_is_asked_for(digits: Path, stock: Path, tmp_path: Path) -> None:
    start = AtStart()
    config = plugged(digits, stock, learns='gates', norm_statistics='running')
    after = weights(run(config, tmp_path, hooks=(start,)))
    assert all(not torch.equal(after[n], start.state[n]) for n in after if n.endswith('running_mean'))
    with pytest.raises(PlugError, match="statistics='off' is not known"):
        run(plugged(digits, stock, learns='gates', norm_statistics='off'), tmp_path)


@pytest.mark.parametrize('constructor', [{}, {'paramwise_cfg': {'norm_decay_mult': 0.0}}])
def test_optimisers_of_every_constructor_have_only_what_learns(
    digits: Path, stock: Path, tmp_path: Path, constructor: dict[str, Any]
) -> None:
    options = {f'optim_wrapper.{key}': value for key, value in constructor.items()}
    config = plugged(digits, stock, learns='gates', **options)
    training.prepare(config, tmp_path)
    runner = LearningRunner.from_cfg(config)
    wrapper = runner.build_optim_wrapper(config.optim_wrapper)
    held = [id(p) for group in wrapper.optimizer.param_groups for p in group['params']]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for n, p in runner.model.named_parameters() if GATES.search(n)}
    assert all(group['params'] for group in wrapper.optimizer.param_groups)


def test_a_shipped_config_names_nothing_of_it(digits: Path, stock: Path) -> None:
    config = plugged(digits, stock, learns='gates', norm_statistics='running')
    assert config.model.backbone.plug_frozen
    shipped = stock_config(config)
    assert not {'learns', 'norm_statistics'} & set(shipped)
    assert 'plug' not in shipped.model.backbone
    assert 'plug_frozen' not in shipped.model.backbone
    build_detector(shipped)
    assert 'plug_frozen' not in partly_stock_config(config, []).model.backbone
    assert 'plug_frozen' not in plugged(digits, stock).model.backbone


def test_it_folds_from_the_config_of_the_run(digits: Path, stock: Path, tmp_path: Path) -> None:
    from asr_downstream.detection.export import fold_checkpoint

    run(plugged(digits, stock, learns='gates', **{'model.backbone.frozen_stages': 1}), tmp_path / 'run')
    written = next((tmp_path / 'run').glob('*.py'))
    report = fold_checkpoint(load_config(written), tmp_path / 'run' / 'epoch_2.pth', tmp_path / 'shipped.pth')
    assert report['feature_map_difference']['float64']['relative'] < 1e-10
    folded, base = weights(tmp_path / 'shipped.pth'), weights(stock)
    assert folded.keys() == base.keys()
    changed = {name for name, value in base.items() if not torch.equal(folded[name], value)}
    assert {name.rpartition('.')[0].rpartition('.')[2] for name in changed} == {'bn2'}
    assert any(name.startswith('backbone.layer1') for name in changed)


def test_distillation_has_a_learns_of_its_own(digits: Path, stock: Path) -> None:
    config = plugged(digits, stock, learns='gates')
    model = build_detector(config)
    config.model.distil = {'learns': 'all'}
    with pytest.raises(AsrError, match="learns='gates', and distil has a learns of its own"):
        learning_of(config, model)


def test_the_plan_says_what_learns_and_what_that_saves(digits: Path, stock: Path, tmp_path: Path) -> None:
    path = as_file(plugged(digits, stock), tmp_path)
    model = build_detector(plugged(digits, stock))
    numbers = {n: p.numel() for n, p in model.named_parameters()}
    gates = sum(v for n, v in numbers.items() if GATES.search(n))
    rest = sum(numbers.values()) - gates
    done = command('train_det', path, '--data-root', digits, '--dry-run', '--learns', 'gates')
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith('learns '))
    assert f'{gates:,} of {gates + rest:,} numbers' in line
    moments = 8 * rest + 4 * sum(not GATES.search(n) for n in numbers)  # AdamW; and a count of steps each
    assert f'saves {rest * 4 / 1000:.3g} kB of gradients and {moments / 1000:.3g} kB of the state' in line
    everything = command('train_det', path, '--data-root', digits, '--dry-run').stdout
    assert f'learns all: {len(numbers)} weights, {gates + rest:,} of {gates + rest:,} numbers (100.00%)' in everything
    help = command('train_det', '--help').stdout
    assert '--learns' in help


def test_the_command_trains_what_it_was_told(digits: Path, stock: Path, tmp_path: Path) -> None:
    path = as_file(tiny(digits, path=ASR, **{'model.backbone.plug.preserve': True}), tmp_path)
    words = ('--data-root', digits, '--load-from', stock)
    learns = ('--learns', 'gates', 'bbox_head.retina_reg.*')
    done = command('train_det', path, '--work-dir', tmp_path / 'run', *words, *learns)
    assert done.returncode == 0, done.stderr
    found = read_checkpoint(tmp_path / 'run' / 'epoch_2.pth')
    assert found['meta'][META]['learns'] == ['gates', 'bbox_head.retina_reg.*']
    base = weights(stock)
    changed = {name for name, value in base.items() if not torch.equal(found['state_dict'][name], value)}
    assert changed == {'bbox_head.retina_reg.weight', 'bbox_head.retina_reg.bias'}
    wrong = command('train_det', path, '--work-dir', tmp_path / 'wrong', *words, '--learns', 'gaets')
    assert wrong.returncode == 1
    assert "'gaets' matches no weight of RetinaNet; did you mean 'gates'?" in wrong.stderr


@pytest.mark.slow
def test_a_launch_trains_as_one_process_does(
    digits: Path, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(plugged(digits, stock, learns='gates', **{'model.backbone.frozen_stages': 1}), tmp_path / 'alone')
    for key in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(key, '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    dist = torch.distributed
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        config = plugged(digits, stock, learns='gates', **{'model.backbone.frozen_stages': 1})
        join(config, 'pytorch')
        start = AtStart()
        found = run(config, tmp_path / 'launched', hooks=(start,))
    finally:
        dist.destroy_process_group()
    assert isinstance(start.wrapped, MMDistributedDataParallel)
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(found)[name], value, msg=name)
    changed = {name for name, value in weights(found).items() if not torch.equal(value, start.state[name])}
    assert changed == {name for name, _ in start.model.named_parameters() if GATES.search(name)}
