"""A restricted model that is copied, released, folded, trained in parallel or in half precision."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.learning import DIA, changed, freezing, made, state_of, step
from helpers.plugged import ASR, CLASSIC, X, tiny
from torch import nn

from asr_downstream import describe, fold, plug
from asr_downstream.models.resnet_cifar import ResNet
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.learning.choose import KEPT, choose
from asr_downstream.plugging.learning.restrict import release, restrict


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('again', [copied, pickled, saved])
def test_copies_are_restricted_as_well(again: Any) -> None:
    model = randomise(made())
    kind = type(model)
    restrict(model, choose(model, 'gates'))
    other = again(model)
    assert type(other) is type(model)
    assert type(other).__name__ == kind.__name__
    assert isinstance(other, kind)
    before, own = state_of(other), state_of(model)
    step(other)
    assert changed(other, before) == {n for n, _ in model.named_parameters() if GATES.search(n)}
    assert not changed(model, own)
    release(other)
    assert type(other) is kind


def test_releasing_gives_the_model_back() -> None:
    model = made()
    kind, flags = type(model), [m.training for m in model.modules()]
    restrict(model, choose(model, 'gates'))
    assert [m.training for m in model.modules()] != flags
    assert type(model) is not kind
    release(model)
    release(model)
    assert type(model) is kind
    assert [m.training for m in model.modules()] == flags
    assert all(p.requires_grad for p in model.parameters())
    assert KEPT not in vars(model)


def test_another_choice_takes_the_place_of_the_first() -> None:
    model = made()
    fresh = choose(model, 'norms')
    restrict(model, choose(model, 'gates'))
    assert choose(model, 'norms') == fresh
    restrict(model, fresh)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(fresh.names)


def test_folding_gives_a_stock_model_that_learns_again() -> None:
    model = randomise(made())
    restrict(model, choose(model, 'gates'))
    folded, _ = fold(model.eval())
    assert type(folded) is ResNet
    assert KEPT not in vars(folded)
    assert all(p.requires_grad for p in folded.parameters())
    assert all(m.training for m in folded.train().modules())
    assert not torch.equal(folded.layer1[0].bn3.weight, model.layer1[0].bn3.weight)
    x = torch.randn(X)
    torch.testing.assert_close(folded.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert describe(model).learning is not None  # the live model is as it was
    stock = tiny()
    restrict(stock, choose(stock, 'norms'))
    with pytest.warns(UserWarning, match='no plugged sites'):
        folded, _ = fold(stock.eval())
    assert type(folded) is ResNet
    assert all(p.requires_grad for p in folded.parameters())


def test_a_model_that_keeps_its_dynamic_gates_is_released_too() -> None:
    model = tiny()
    plug(model, [ASR, CLASSIC])
    restrict(model, choose(model, 'gates'))
    partly, _ = fold(model.eval(), dynamic='keep')
    assert describe(partly).learning is None
    assert type(partly) is ResNet


def test_data_parallel_training_changes_nothing_else(tmp_path: Path) -> None:
    model = randomise(freezing())
    alone = copy.deepcopy(model)
    restrict(model, choose(model, 'gates'))
    restrict(alone, choose(alone, 'gates'))
    dist = torch.distributed
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        before = state_of(model)
        torch.manual_seed(1)
        step(nn.parallel.DistributedDataParallel(model))
        assert changed(model, before) == {n for n, _ in model.named_parameters() if GATES.search(n)}
    finally:
        dist.destroy_process_group()
    torch.manual_seed(1)
    step(alone)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize('spec', [DIA, CLASSIC], ids=lambda spec: spec['type'])
def test_low_memory_gives_the_same_gradients(spec: Any) -> None:
    spec = {**spec, 'memory': 'low'}
    one = randomise(made(spec)).double()
    other = copy.deepcopy(one).eval()
    restrict(one, choose(one, 'gates'))
    x = torch.randn(X, dtype=torch.float64)
    one.train()(x).square().mean().backward()
    other(x).square().mean().backward()
    expected = dict(other.named_parameters())
    found = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n in expected if GATES.search(n)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-9, atol=1e-13, msg=name)


def test_half_precision_changes_nothing_else() -> None:
    model = randomise(made())
    restrict(model, choose(model, 'gates'))
    before = state_of(model)
    with torch.autocast('cpu', torch.bfloat16):
        step(model)
    assert changed(model, before) == {n for n, _ in model.named_parameters() if GATES.search(n)}
