"""Detectors in which only a part learns: what changes, what the optimiser holds, and that runs go on as they would."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.tiny_detection import (
    FLIP,
    Dead,
    DieAt,
    SignalAt,
    as_file,
    assert_same,
    pictures,
    run,
    tiny,
    weights,
)
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel

from asr_downstream.adapters.base import BASE_FILE, read_base
from asr_downstream.console.stopping import Stopped
from asr_downstream.detection.config import load_config, partly_stock_config, stock_config
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.detection.training import train as training
from asr_downstream.detection.training.launch import join
from asr_downstream.detection.training.learning import META, LearningRunner, learning_of
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.learning.restrict import restrict

ASR = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
DIA = 'det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py'
FLIPS = {'train_dataloader.dataset.pipeline': FLIP}
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def stock(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the stock detector, with statistics and affines that are not those of a fresh one."""
    config = tiny(digits)
    path = tmp_path_factory.mktemp('stock') / 'stock.pth'
    torch.save({'state_dict': randomise(build_detector(config)).state_dict()}, path)
    return path


def plugged(digits: Path, stock: Path | None, path: str = ASR, **options: Any) -> Any:
    start = {} if stock is None else {'load_from': str(stock)}
    return tiny(digits, path=path, **{'model.backbone.plug.preserve': True, **start, **options})


class AtStart(Hook):
    """Keeps the weights before the first step."""

    priority = 'LOWEST'

    def before_train(self, runner: Any) -> None:
        self.wrapped = runner.model
        model = getattr(runner.model, 'module', runner.model)
        self.state = copy.deepcopy(model.state_dict())
        self.optimiser = runner.optim_wrapper.optimizer
        self.model = model


def is_norm(name: str) -> bool:
    return bool(re.search(r'\.(bn\d|downsample\.1)\.(weight|bias)$', name))


IN = {
    'gates': lambda name: bool(GATES.search(name)),
    'norms': is_norm,
    'gates+norms': lambda name: bool(GATES.search(name)) or is_norm(name),
    'bias': lambda name: name.endswith('bias') and not GATES.search(name),
    'bbox_head.*': lambda name: name.startswith('bbox_head.'),
}


@pytest.mark.parametrize('path', [ASR, DIA])
@pytest.mark.parametrize('learns', IN)
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


@pytest.mark.parametrize('stop', [DieAt, SignalAt])
@pytest.mark.parametrize('options', [{'learns': 'gates'}, {'learns': ['gates+norms', 'bbox_head.*'], 'ema': True}])
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


def test_another_choice_does_not_resume(digits: Path, stock: Path, tmp_path: Path) -> None:
    run(plugged(digits, stock, learns='gates', **{'train_cfg.max_epochs': 1}), tmp_path)
    for learns in ('norms', 'all', ['gates', 'norms']):
        with pytest.raises(CheckpointError, match=r"was trained with learns=\['gates'\], the config says"):
            run(plugged(digits, stock, learns=learns), tmp_path, 'latest')


def test_gradients_are_accumulated(digits: Path, stock: Path, tmp_path: Path) -> None:
    start = AtStart()
    config = plugged(digits, stock, learns='gates', **{'optim_wrapper.accumulative_counts': 2})
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    assert changed == {name for name, _ in start.model.named_parameters() if GATES.search(name)}


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


def test_gates_in_frozen_stages_learn_and_the_stages_do_not(digits: Path, stock: Path, tmp_path: Path) -> None:
    options = {'model.backbone.frozen_stages': 1, 'model.backbone.norm_eval': True}
    config = plugged(digits, stock, learns='gates', **options)
    start = AtStart()
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    inside = {name for name in changed if name.startswith('backbone.layer1.')}
    assert {name.rpartition('.gate.')[0] for name in inside} == {'backbone.layer1.0.bn2', 'backbone.layer1.1.bn2'}
    assert changed == {name for name, _ in start.model.named_parameters() if GATES.search(name)}
    with pytest.warns(UserWarning, match='2 sites lie in frozen blocks'):  # where all learn, these never would
        assert len(describe(build_detector(plugged(digits, stock, **options))).sites) == 4


def test_norms_of_frozen_stages_stay_frozen_unless_a_pattern_names_them(
    digits: Path, stock: Path, tmp_path: Path
) -> None:
    config = plugged(digits, stock, learns=['norms', 'backbone.layer1.0.bn1.*'], **{'model.backbone.frozen_stages': 1})
    start = AtStart()
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    first = {name for name in changed if name.startswith(('backbone.layer1.', 'backbone.bn1'))}
    assert first == {'backbone.layer1.0.bn1.weight', 'backbone.layer1.0.bn1.bias'}  # statistics: mmdet's own eval mode
    assert 'backbone.layer2.0.bn1.weight' in changed


def test_the_head_of_other_classes_learns_by_itself_and_goes_on(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(**options: Any) -> Any:
        base = digits.parent / 'few.pth'
        return plugged(digits, base, learns='gates', **FLIPS, **options)

    few = randomise(build_detector(tiny(digits, **{'model.bbox_head.num_classes': 3})))
    torch.save({'state_dict': few.state_dict()}, digits.parent / 'few.pth')
    head = {'bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'}
    start = AtStart()
    whole = run(config(), tmp_path / 'whole', hooks=(start,))
    changed = {name for name, value in weights(whole).items() if not torch.equal(value, start.state[name])}
    assert {name for name in changed if not GATES.search(name)} == head
    said = capsys.readouterr().out
    assert 'size mismatch for bbox_head.retina_cls.weight' in said
    assert 'missing keys' not in said  # the gates
    assert set(read_checkpoint(whole)['meta'][META]['new']) == head
    assert set(read_base(tmp_path / 'whole' / BASE_FILE).heads) == head
    with pytest.raises(Dead):
        run(config(), tmp_path / 'parts', hooks=(DieAt(4),))
    assert_same(run(config(), tmp_path / 'parts', 'auto'), whole)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.update(more=torch.zeros(1)), r'another model than the config builds \(RetinaNet\): it has more,'),
        (lambda s: s.update({'backbone.layer1.0.bn2.gate.0.odd': torch.zeros(1)}), 'has gates that RetinaNet has not'),
        (lambda s: s.update({'backbone.layer1.0.bn2.gate.0.psi': torch.zeros(1, 4)}), 'its gates are others'),
        (lambda s: [s.pop(k) for k in list(s)] and s.update(a=torch.zeros(1)), 'another model .* it has a, and lacks'),
    ],
)
def test_a_base_of_another_model_is_refused(
    digits: Path, stock: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    state = weights(stock)
    change(state)
    torch.save({'state_dict': state}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=rf'other\.pth: .*{message}'):
        run(plugged(digits, tmp_path / 'other.pth', learns='gates'), tmp_path / 'run')


def test_a_part_that_the_base_has_not_learns_and_another_head_is_named(
    digits: Path, stock: Path, tmp_path: Path
) -> None:
    state = weights(stock)
    del state['neck.fpn_convs.0.conv.bias']
    torch.save({'state_dict': state}, tmp_path / 'less.pth')
    config = plugged(digits, tmp_path / 'less.pth', learns='gates')
    assert learning_of(config, build_detector(config)).new == ('neck.fpn_convs.0.conv.bias',)
    state['bbox_head.fc.weight'] = torch.zeros(1)
    torch.save({'state_dict': state}, tmp_path / 'head.pth')
    config = plugged(digits, tmp_path / 'head.pth', learns=['gates', 'bbox_head.*'])
    assert 'bbox_head.retina_cls.weight' in learning_of(config, build_detector(config)).names
    config.learns = 'gates'
    with pytest.raises(CheckpointError, match=r'it has bbox_head.fc.weight'):
        learning_of(config, build_detector(config))


def test_a_plugged_checkpoint_is_a_base_as_well(digits: Path, stock: Path, tmp_path: Path) -> None:
    first = run(plugged(digits, stock, learns='gates'), tmp_path / 'first')
    start = AtStart()
    run(plugged(digits, first, learns='gates'), tmp_path / 'second', hooks=(start,))
    assert all(torch.equal(start.state[name], value) for name, value in weights(first).items())


def test_without_a_base_it_is_said(digits: Path) -> None:
    config = plugged(digits, None, learns='gates')
    with pytest.warns(UserWarning, match=r"learns='gates', and no load_from: what is frozen stays as it is drawn"):
        learning_of(config, build_detector(config))


def test_a_start_that_is_not_the_base_is_said(digits: Path, stock: Path) -> None:
    config = plugged(digits, stock, learns='gates', **{'model.backbone.plug.preserve': False})
    with pytest.warns(UserWarning, match='do not start at 1'):
        learning_of(config, build_detector(config))


def test_gates_of_a_stock_model_are_refused(digits: Path, stock: Path, tmp_path: Path) -> None:
    with pytest.raises(PlugError, match='RetinaNet has no gates, it is a stock model'):
        run(tiny(digits, learns='gates', load_from=str(stock)), tmp_path)
    config = tiny(digits, learns='bbox_haed.*', load_from=str(stock))
    with pytest.raises(PlugError, match=r"'bbox_haed.\*' matches no weight of RetinaNet; the nearest are bbox_head"):
        run(config, tmp_path)


def test_a_stock_detector_trains_its_norms(digits: Path, stock: Path, tmp_path: Path) -> None:
    start = AtStart()
    after = weights(run(tiny(digits, learns='norms', load_from=str(stock)), tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    assert {name for name in changed if not name.endswith(STATISTICS)} == set(filter(is_norm, start.state))


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
    words = ('--data-root', digits, '--work-dir', tmp_path / 'run', '--load-from', stock)
    done = command('train_det', path, *words, '--learns', 'gates', 'bbox_head.retina_reg.*')
    assert done.returncode == 0, done.stderr
    found = read_checkpoint(tmp_path / 'run' / 'epoch_2.pth')
    assert found['meta'][META]['learns'] == ['gates', 'bbox_head.retina_reg.*']
    base = weights(stock)
    changed = {name for name, value in base.items() if not torch.equal(found['state_dict'][name], value)}
    assert changed == {'bbox_head.retina_reg.weight', 'bbox_head.retina_reg.bias'}
    wrong = command('train_det', path, *words, '--learns', 'gaets')
    assert wrong.returncode == 1
    assert "'gaets' matches no weight of RetinaNet; did you mean 'gates'?" in wrong.stderr


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
