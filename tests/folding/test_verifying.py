"""verify: nothing that two models share, and nothing that was not compared, may look like agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr_downstream import AsrError, FoldError, fold, fuse_conv_bn, plug, verify


class Call(nn.Module):
    """A model that is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass(slots=True)
class Slotted:
    """An output with slots and no dict."""

    sample: Tensor
    name: str = 'x'


class Plain:
    """An output of a class of its own, with a reference to itself."""

    def __init__(self, sample: Tensor) -> None:
        self.me = self
        self.sample = sample


class Base:
    __slots__ = ('first',)

    def __init__(self, first: Tensor) -> None:
        self.first = first


class Derived(Base):
    __slots__ = ('second',)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__(first)
        self.second = second


ONE = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    'inputs',
    [lambda: ONE.clone(), lambda: (ONE.clone(),), lambda: {'x': ONE.clone()}, lambda: [ONE.clone(), ONE.clone()]],
    ids=['tensor', 'tuple', 'dict', 'list'],
)
def test_each_model_has_inputs_of_its_own(inputs: Callable[[], Any]) -> None:
    assert verify(Call(lambda x: x.mul_(2)), Call(lambda x: x.mul_(3)), inputs()).absolute == 3.0
    assert verify(nn.ReLU(inplace=True).eval(), nn.Identity().eval(), ONE.clone()).absolute == 2.0


def test_nested_inputs_are_copied_and_what_the_user_gave_stays() -> None:
    given = {'x': [ONE.clone(), {'y': ONE.clone()}]}
    model = Call(lambda x: [x[0].mul_(2), x[1]['y'].zero_()])
    verify(model, model, given)
    assert torch.equal(given['x'][0], ONE)
    assert torch.equal(given['x'][1]['y'], ONE)


def test_one_tensor_given_twice_is_one_tensor_for_the_model() -> None:
    found: list[bool] = []
    model = Call(lambda x, y: (found.append(x is y), x + y)[1])
    x = ONE.clone()
    verify(model, model, (x, x))
    assert found == [True, True]


def test_inputs_with_a_graph_are_copied_too() -> None:
    x = torch.ones(3, requires_grad=True) * 2
    assert verify(nn.Identity().eval(), nn.Identity().eval(), x).absolute == 0


def test_reused_output_buffers_are_kept_apart() -> None:
    buffer = torch.zeros(3)
    models = [Call(lambda x, f=f: buffer.copy_(x * f)) for f in (2, 3)]
    assert verify(*models, ONE).absolute == 3.0
    kept: list[Tensor] = [buffer]
    models = [Call(lambda x, f=f: (buffer.copy_(x * f), kept)[1]) for f in (2, 3)]
    assert verify(*models, ONE).absolute == 3.0


def test_complex_outputs_are_compared_as_complex() -> None:
    z = torch.tensor([1 + 1j, 2 - 1j])
    assert verify(Call(lambda x: x), Call(lambda x: x.conj()), z).absolute == pytest.approx(2.0)
    assert verify(Call(lambda x: x), Call(lambda x: x), z).absolute == 0
    assert verify(Call(lambda x: x), Call(lambda x: x.conj()), z).relative == pytest.approx(2 / math.sqrt(5))


def test_complex_nan_is_infinitely_far() -> None:
    z = torch.tensor([complex(1, math.nan)])
    assert verify(Call(lambda x: x), Call(lambda x: x), z).absolute == math.inf


@pytest.mark.parametrize(
    ('make', 'name'),
    [
        (Slotted, 'output.sample'),
        (lambda x: Derived(torch.zeros(1), x), 'output.second'),
        (lambda x: {'a': [Slotted(x)]}, 'output.a[0].sample'),
        (lambda x: x.numpy().copy(), 'output'),
        (lambda x: float(x.sum()), 'output'),
        (lambda x: {'n': [int(x.sum())]}, 'output.n[0]'),
    ],
    ids=['slots', 'inherited slots', 'nested', 'numpy', 'number', 'nested number'],
)
def test_tensors_are_found_wherever_they_lie(make: Callable[[Tensor], Any], name: str) -> None:
    found = verify(Call(make), Call(lambda x: make(x * 2)), ONE)
    worst = max(found.outputs, key=lambda d: d.absolute)
    assert worst.output == name
    assert worst.absolute >= 2.0


def test_objects_that_refer_to_themselves_are_walked_once() -> None:
    assert verify(Call(Plain), Call(lambda x: Plain(x * 2)), ONE).absolute == 3.0


@pytest.mark.parametrize(
    ('kind', 'make'),
    [
        ('sparse', lambda x: x.to_sparse()),
        ('bool', lambda x: x > 1.5),
        ('int64', lambda x: (x * 2**60).long() + x.long()),
        ('bfloat16', lambda x: x.bfloat16()),
    ],
)
def test_every_kind_of_tensor_is_compared(kind: str, make: Callable[[Tensor], Tensor]) -> None:
    assert verify(Call(make), Call(make), ONE).absolute == 0
    assert verify(Call(make), Call(lambda x: make(x * 2)), ONE).absolute > 0


def test_large_integers_are_compared_exactly() -> None:
    n = torch.tensor([2**60])
    assert verify(Call(lambda x: x), Call(lambda x: x + 1), n).absolute == 1.0


def test_what_was_not_compared_is_said() -> None:
    found = verify(*[Call(lambda x: {'a': x, 'text': 'yes', 'none': None, 'empty': x[:0], 'f': max})] * 2, ONE)
    assert [d.output for d in found.outputs] == ['output.a']
    assert set(found.skipped) == {'output.empty (no elements)', 'output.f (builtin_function_or_method)'}
    assert 'not compared: ' in str(found)
    assert 'output.empty (no elements)' in str(found)
    assert 'not compared' not in str(verify(nn.Identity().eval(), nn.Identity().eval(), ONE))


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda x: 'text', 'no tensors'),
        (lambda x: None, 'no tensors'),
        (lambda x: x[:0], r'no tensors.*output \(no elements\)'),
        (lambda x: [x[:0], 'text'], r'no tensors'),
    ],
    ids=['text', 'none', 'empty', 'both'],
)
def test_nothing_compared_is_an_error(make: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(AsrError, match=words):
        verify(Call(make), Call(make), ONE)


def test_no_inputs_are_an_error() -> None:
    with pytest.raises(AsrError, match='inputs'):
        verify(nn.Identity().eval(), nn.Identity().eval(), [])


def test_texts_that_differ_are_outputs_that_differ() -> None:
    with pytest.raises(AsrError, match=r"output\.kind.*'a'.*'b'"):
        verify(Call(lambda x: {'x': x, 'kind': 'a'}), Call(lambda x: {'x': x, 'kind': 'b'}), ONE)


def test_kinds_that_differ_are_an_error() -> None:
    with pytest.raises(AsrError, match='complex'):
        verify(Call(lambda x: x), Call(lambda x: x.to(torch.complex64)), ONE)


def test_calibration_gives_both_models_their_own_batches() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True))
    plug(model, dict(type='Attention', attention=dict(type='SE', reduction=2), sites=['1']))
    batches = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    before = [b.clone() for b in batches]
    fold(model.eval(), calibrate=batches)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def test_fusing_gives_both_models_their_own_inputs() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    fuse_conv_bn(model, x)
    assert torch.equal(x, before)


def test_arrays_of_text_are_not_numbers() -> None:
    make = Call(lambda x: {'x': x, 'names': np.array(['a', 'b'])})
    assert verify(make, make, ONE).absolute == 0


def test_fold_error_of_a_model_that_returns_nothing_to_compare() -> None:
    model = Call(lambda x: 'text')
    model.layer = nn.Linear(3, 8)
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=2), sites=['layer']))
    with pytest.raises(FoldError, match='no tensors'):
        fold(model.eval(), check=ONE)


def test_a_small_input_that_differs_is_not_lost_beside_a_large_one() -> None:
    one, half = torch.ones(2), torch.full((2,), 1e6)
    a, b = Call(lambda x: x), Call(lambda x: x + 0.5 * (x == 1) + (x == 1e6))
    assert verify(b, a, [one, half]).relative == pytest.approx(0.5)
    assert verify(b, a, [one, half]).absolute == pytest.approx(1)
    assert verify(b, a, [half]).relative == pytest.approx(1e-6)
