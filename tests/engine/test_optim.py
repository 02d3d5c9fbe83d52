"""Optimisers by name and the schedule by steps: torch's own, resumed, refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import SCHEMA, Classification, change_progress, config_for, groups_of, run_of, seal
from torch import nn

from asr_downstream.engine.optim import build_optimiser, build_schedule, decay_of
from asr_downstream.engine.state.save import bytes_of
from asr_downstream.engine.state.train_state import check_optimiser, shape_of_state
from asr_downstream.errors import AsrError, CheckpointError

SGD: dict[str, Any] = dict(optimizer='sgd', learning_rate=0.1, weight_decay=1e-4)
STEP: dict[str, Any] = dict(lr_scheduler='step', lr_warmup_steps=0)


def rates(config: Any) -> list[float]:
    """Rate of every step, as the optimiser of a training has it."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule, found = build_schedule(optimiser, config), []
    for _ in range(config.max_train_steps):
        found.append(optimiser.param_groups[0]['lr'])
        optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize(('milestones', 'gamma'), [([3, 8], 0.1), ([0.3, 0.8], 0.1), ([5], 0.2), ([0.5, 7], 0.5)])
def test_the_schedule_by_steps_is_multi_step_lr_of_torch(tmp_path: Path, milestones: Any, gamma: float) -> None:
    kwargs = {'milestones': milestones, 'gamma': gamma}
    config = config_for(tmp_path, **STEP, lr_scheduler_kwargs=kwargs, max_train_steps=10, learning_rate=0.1)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    at = [round(10 * m) if m < 1 else m for m in milestones]
    theirs, expected = torch.optim.lr_scheduler.MultiStepLR(optimiser, at, gamma), []
    for _ in range(10):
        expected.append(optimiser.param_groups[0]['lr'])
        optimiser.step()
        theirs.step()
    assert rates(config) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == len(milestones) + 1


def test_a_warmup_comes_before_the_steps(tmp_path: Path) -> None:
    settings = dict(STEP, lr_warmup_steps=4, lr_scheduler_kwargs={'milestones': [6]}, max_train_steps=8)
    assert rates(config_for(tmp_path, **settings, learning_rate=1.0)) == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1]
    )


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({}, 'milestones'),
        ({'milestones': 3}, 'should be a list of steps or of shares'),
        ({'milestones': [True]}, 'should be a list of steps or of shares'),
        ({'milestones': [8, 3]}, 'each after the last'),
        ({'milestones': [0.5, 0.5]}, 'each after the last'),
        ({'milestones': [0]}, 'should be steps, or shares between 0 and 1'),
        ({'milestones': [1.5]}, 'should be steps, or shares between 0 and 1'),
        ({'milestones': [3], 'gamma': 0}, 'gamma=0 should be a number greater than 0'),
        ({'milestones': [3], 'gama': 0.1}, "takes no 'gama'; did you mean 'gamma'"),
    ],
)
def test_milestones_that_are_none_are_refused(tmp_path: Path, kwargs: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        run_of(tmp_path, **STEP, lr_scheduler_kwargs=kwargs)
    assert not list(tmp_path.iterdir())


def test_sgd_trains_as_that_of_torch(tmp_path: Path) -> None:
    """Three steps on the same weights, gradients and rates."""
    for nesterov in (False, True):
        config = config_for(tmp_path, **SGD, momentum=0.8, nesterov=nesterov)
        mine, theirs = (nn.Linear(3, 2) for _ in range(2))
        theirs.load_state_dict(mine.state_dict())
        optimisers = (
            build_optimiser([{'params': [*mine.parameters()], 'weight_decay': decay_of(config)}], config),
            torch.optim.SGD(theirs.parameters(), 0.1, 0.8, weight_decay=1e-4, nesterov=nesterov),
        )
        for _ in range(3):
            x = torch.randn(4, 3)
            for model, optimiser in zip((mine, theirs), optimisers, strict=True):
                optimiser.zero_grad()
                model(x).square().mean().backward()
                optimiser.step()
        assert torch.equal(mine.weight, theirs.weight)


def test_the_decay_is_that_of_the_optimiser(tmp_path: Path) -> None:
    found = {
        'adamw': decay_of(config_for(tmp_path, adam_weight_decay=0.3)),
        'adamw, said': decay_of(config_for(tmp_path, adam_weight_decay=0.3, weight_decay=0.2)),
        'sgd': decay_of(config_for(tmp_path, optimizer='sgd', adam_weight_decay=0.3)),
        'sgd, said': decay_of(config_for(tmp_path, **SGD)),
    }
    assert found == {'adamw': 0.3, 'adamw, said': 0.2, 'sgd': 0.0, 'sgd, said': 1e-4}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(optimizer='sdg'), "optimizer='sdg' is not known; did you mean 'sgd'"),
        (dict(optimizer='sgd', momentum=1.0), 'momentum=1.0 should be at least 0 and less than 1'),
        (dict(optimizer='sgd', weight_decay=-1), 'weight_decay=-1 should be at least 0'),
        (dict(optimizer='sgd', nesterov=1), 'nesterov=1 should be bool'),
    ],
)
def test_settings_that_are_none_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        SCHEMA.from_dict({'max_train_steps': 5, **settings}, 'stage')


def test_nesterov_without_momentum_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AsrError, match='optimizer: sgd does not take momentum=0.0, nesterov=True'):
        run_of(tmp_path, **SGD, momentum=0.0, nesterov=True)


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_a_resumed_sgd_run_is_the_uninterrupted_one(tmp_path: Path, momentum: float) -> None:
    settings = dict(SGD, **STEP, lr_scheduler_kwargs={'milestones': [2, 5]}, momentum=momentum)
    whole, last = run_of(tmp_path, **settings)
    assert [group['momentum'] for group in groups_of(last)] == [momentum] * 2
    assert [group['lr'] for group in groups_of(last)] == pytest.approx([1e-3] * 2)
    last.rename(tmp_path / 'gone')
    again, _ = run_of(tmp_path, 'latest', **settings)
    assert again.steps == [4, 5, 6]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_a_checkpoint_is_bound_to_its_optimiser(tmp_path: Path) -> None:
    _, last = run_of(tmp_path, max_train_steps=3)
    with pytest.raises(CheckpointError, match='was trained with optimizer=adamw, the config says sgd; use the config'):
        run_of(tmp_path, 'latest', **SGD)
    # One that is older than the key was trained with AdamW, and goes on with it.
    for key in ('optimizer', 'weight_decay', 'momentum', 'nesterov'):
        change_progress(last, lambda content, key=key: content['settings'].pop(key))
    with pytest.raises(CheckpointError, match='optimizer=adamw'):
        run_of(tmp_path, 'latest', **SGD)
    task, _ = run_of(tmp_path, 'latest')
    assert task.steps == [4, 5, 6]


def test_the_least_size_of_a_checkpoint_counts_the_moments(tmp_path: Path) -> None:
    model = Classification(config_for(tmp_path)).model
    weights = bytes_of(model, None, 0)
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert weights == sum(value.nbytes for value in model.state_dict().values())
    assert bytes_of(model, None, 1) == weights + learning
    assert bytes_of(model, None) == weights + 2 * learning
    _, last = run_of(tmp_path, **SGD)
    assert (last / 'optimizer.bin').stat().st_size > learning


def test_a_resumed_adafactor_run_is_the_uninterrupted_one_with_a_small_state(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(optimizer='adafactor', learning_rate=0.01)
    whole, last = run_of(tmp_path, **settings)
    state = torch.load(last / 'optimizer.bin', weights_only=True)['state']
    kept = sum(v.numel() for each in state.values() for v in each.values())
    assert 0 < kept < sum(p.numel() for p in whole.model.parameters()) / 2
    last.rename(tmp_path / 'gone')
    again, _ = run_of(tmp_path, 'latest', **settings)
    assert again.steps == [4, 5, 6]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize('shape', [(4, 3), (4,), (2, 3, 5), (1, 1)])
def test_a_state_has_the_shape_that_torch_gives_it(shape: tuple[int, ...]) -> None:
    for cls in (torch.optim.Adafactor, torch.optim.AdamW):
        parameter = nn.Parameter(torch.randn(shape))
        parameter.grad = torch.randn(shape)
        optimiser = cls([parameter])
        optimiser.step()
        for key, value in optimiser.state[parameter].items():
            assert not value.ndim or tuple(value.shape) == shape_of_state(key, parameter), key


@pytest.mark.parametrize('key', ['row_var', 'col_var'])
def test_sums_of_another_dimension_are_refused(tmp_path: Path, key: str) -> None:
    settings: dict[str, Any] = dict(optimizer='adafactor', learning_rate=0.01)
    _, last = run_of(tmp_path, **settings)
    state = torch.load(last / 'optimizer.bin', weights_only=True)
    first = next(each for each in state['state'].values() if key in each)
    first[key] = first[key].mT.contiguous()
    torch.save(state, last / 'optimizer.bin')
    seal(last)
    with pytest.raises(CheckpointError, match=f'{key} of .* does not fit it'):
        run_of(tmp_path, 'latest', **{**settings, 'max_train_steps': 8})


# 8 bits ---------------------------------------------------------------------------------------------------------------

EIGHT: dict[str, Any] = dict(optimizer='adamw8bit', width=600)  # smaller weights keep moments of 32 bits


def test_8_bits_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(
        AsrError, match=r"adamw8bit needs bitsandbytes .*pip install bitsandbytes, or use .*'adafactor'"
    ):
        run_of(tmp_path, **EIGHT)


def test_shapes_of_8_bits_are_known_by_name() -> None:
    weight = nn.Parameter(torch.zeros(10, 60))
    assert [shape_of_state(key, weight) for key in ('state1', 'qmap2', 'absmax1')] == [(10, 60), (256,), (3,)]
    assert shape_of_state('absmax', weight) == (10, 60)


@pytest.mark.parametrize('count', [-1, 2.5, True, '3', None])
def test_a_count_of_steps_is_a_number(count: Any) -> None:
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    optimiser.state[model.weight] = {'step': 3, 'state1': torch.zeros(2, 3)}
    check_optimiser(optimiser, model, True, Path('optimizer.bin'))
    optimiser.state[model.weight]['step'] = count
    with pytest.raises(CheckpointError, match='step of weight does not fit it'):
        check_optimiser(optimiser, model, True, Path('optimizer.bin'))


def test_a_resumed_run_of_8_bits_is_the_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    whole, last = run_of(tmp_path, **EIGHT)
    plain, _ = run_of(tmp_path / 'plain', **{**EIGHT, 'optimizer': 'adamw'})
    apart = (whole.model[4].weight - plain.model[4].weight).abs().max()
    assert 0 < apart < 0.02  # the same optimiser, in 8 bits
    state = torch.load(last / 'optimizer.bin', weights_only=True)['state']
    assert any(value.dtype == torch.uint8 for each in state.values() for value in tensors(each))
    last.rename(tmp_path / 'gone')
    again, last = run_of(tmp_path, 'latest', **EIGHT)
    assert again.steps == [4, 5, 6]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    state = torch.load(last / 'optimizer.bin', weights_only=True)
    inner = [each for one in state['state'].values() for each in (one, *one.values()) if isinstance(each, dict)]
    scales = next(each for each in inner if 'absmax1' in each)
    scales['absmax1'] = scales['absmax1'][1:].clone()
    torch.save(state, last / 'optimizer.bin')
    seal(last)
    with pytest.raises(CheckpointError, match='absmax1 of .* does not fit it'):
        run_of(tmp_path, 'latest', **{**EIGHT, 'max_train_steps': 8})


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors of a state, also in dicts of it."""
    found = []
    for value in state.values():
        found += tensors(value) if isinstance(value, dict) else [value] if isinstance(value, torch.Tensor) else []
    return found
