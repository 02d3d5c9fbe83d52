"""The cell of DIA in few operators: equal to the plain formulas in all derivatives, and only used where it may be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.shared import BY_BLOCK, DIA, assert_same, images, plugged, results
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.func import functional_call, grad, vmap

from asr_downstream.attention import DIALSTM, dia_lstm
from asr_downstream.attention.kernels.late_weights import Gather, LateWeights
from asr_downstream.measure.launches import Launches

C = 6


def cell(dtype: torch.dtype = torch.float64) -> DIALSTM:
    torch.manual_seed(0)
    return randomise(DIALSTM(C, reduction=2)).to(dtype)


def descriptors(sites: int = 3, batch: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, C, dtype=dtype).requires_grad_() for _ in range(sites)]


@contextmanager
def plain() -> Iterator[None]:
    """The plain formulas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dia_lstm, 'eager', lambda: False)
        yield


def run(unit: DIALSTM, inputs: list[Tensor]) -> list[Tensor]:
    """Gates of all sites of a run, and the last state."""
    state, gates = None, []
    for y in inputs:
        h, state = unit.step(y, state)
        gates.append(h)
    return [*gates, state.c]


def loss(outputs: list[Tensor]) -> Tensor:
    return sum(((k + 1) * y).sin().sum() for k, y in enumerate(outputs))


def derivatives(unit: DIALSTM, inputs: list[Tensor], orders: int) -> list[Tensor]:
    """Outputs and derivatives up to an order, each of the squares of those before."""
    wanted = [*inputs, *unit.parameters()]
    found = outputs = run(unit, inputs)
    value = loss(outputs)
    for order in range(orders):
        grads = torch.autograd.grad(value, wanted, create_graph=order < orders - 1)
        found = [*found, *grads]
        value = sum(g.square().sum() for g in grads)
    return [t.detach() for t in found]


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize('orders', [1, 2, 3])
@pytest.mark.parametrize('sites', [1, 2, 4])
def test_equals_the_plain_formulas(sites: int, orders: int) -> None:
    unit, inputs = cell(), descriptors(sites)
    ours = derivatives(unit, inputs, orders)
    with plain():
        theirs = derivatives(unit, inputs, orders)
    same(ours, theirs)
    assert max(float(t.abs().max()) for t in ours[-4:]) > 1e-3


@pytest.mark.parametrize('used', [[0], [2], [3], [0, 3], [1, 2]], ids=str)
def test_outputs_that_no_loss_uses(used: list[int]) -> None:
    """Gates without a state behind them, a state without gates, sites that are in no graph."""
    unit, inputs = cell(), descriptors(3)

    def found() -> list[Tensor]:
        outputs = run(unit, inputs)
        wanted = [*inputs, *unit.parameters()]
        grads = torch.autograd.grad(loss([outputs[k] for k in used]), wanted, materialize_grads=True)
        return [t.detach() for t in (*outputs, *grads)]

    ours = found()
    with plain():
        same(ours, found())


@pytest.mark.parametrize('trained', ['ih.0.weight', 'hh.2.bias', 'hh', 'ih', ''])
def test_frozen_weights(trained: str) -> None:
    unit, inputs = cell(), descriptors(3)
    for name, p in unit.named_parameters():
        p.requires_grad_(bool(trained) and name.startswith(trained))

    def found() -> list[Tensor | None]:
        for t in (*inputs, *unit.parameters()):
            t.grad = None
        loss(run(unit, inputs)).backward()
        return [t.grad for t in (*inputs, *unit.parameters())]

    ours = found()
    with plain():
        theirs = found()
    assert [g is None for g in ours] == [g is None for g in theirs]
    same([g for g in ours if g is not None], [g for g in theirs if g is not None])


def test_a_cell_that_is_used_alone_gives_all_its_weights_a_gradient() -> None:
    """Gradients of zero, not none: DDP waits for each."""
    unit = cell()
    unit(torch.randn(2, C, 3, 3, dtype=torch.float64)).sum().backward()
    assert not [name for name, p in unit.named_parameters() if p.grad is None]
    assert not unit.hh[0].weight.grad.any()


def test_only_the_gradients_that_are_asked_for_and_several_passes_over_a_graph() -> None:
    unit, inputs = cell(), descriptors(3)
    gates, state = unit.step(inputs[0])
    for y in inputs[1:]:
        gates, state = unit.step(y, state)
    value = loss([gates, state.c])
    of_inputs = torch.autograd.grad(value, inputs, retain_graph=True)
    assert not state.late.rows  # nothing is kept that nobody takes
    wanted = [*inputs, *unit.parameters()]
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    second = torch.autograd.grad(value, wanted)
    same(list(first[:3]), list(of_inputs), 0)
    same(list(second), list(first), 0)


def test_a_backward_pass_that_breaks_off_leaves_nothing_to_the_next() -> None:
    unit, inputs = cell(), descriptors(3)
    expected = torch.autograd.grad(loss(run(unit, inputs)), list(unit.parameters()))
    value = loss(run(unit, inputs))
    handle = inputs[1].register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        value.backward(retain_graph=True)
    handle.remove()
    same(list(torch.autograd.grad(value, list(unit.parameters()))), list(expected), 1e-14)


def test_gradients_of_many_outputs_at_once() -> None:
    unit, inputs = cell(), descriptors(2)
    outputs = run(unit, inputs)
    dys = torch.randn(5, *outputs[1].shape, dtype=torch.float64)
    wanted = [*inputs, *unit.parameters()]
    together = torch.autograd.grad(outputs[1], wanted, dys, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(outputs[1], wanted, dy, retain_graph=True) for dy in dys]
    same(list(together), [torch.stack(each) for each in zip(*apart, strict=True)])


@pytest.mark.slow
def test_compiled_autograd() -> None:
    unit, inputs = cell(), descriptors(3)
    expected = torch.autograd.grad(loss(run(unit, inputs)), list(unit.parameters()))
    with compiled_autograd._enable(torch.compile(backend='eager')):
        loss(run(unit, inputs)).backward()
    same([p.grad for p in unit.parameters()], list(expected), 1e-14)


@pytest.mark.parametrize('call', ['vmap', 'grad', 'compile', 'forward-mode', 'trace'])
def test_transforms_and_compilers_take_the_plain_formulas(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, inputs = cell(), [t.detach() for t in descriptors(2)]
    expected = [t.detach() for t in run(unit, inputs)]
    of_weights = dict(unit.named_parameters())

    def forward(*ys: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(unit, list(ys)))

    def scalar(weights: dict[str, Tensor]) -> Tensor:
        state = None
        for y in inputs:
            gates, state = functional_call(Stepping(unit), {f'unit.{k}': v for k, v in weights.items()}, (y, state))
        return gates.sin().sum()

    monkeypatch.setattr(Gather, 'forward', None)  # calling it would fail
    if call == 'vmap':
        found = vmap(forward)(*(y[:, None] for y in inputs))
        same([t.squeeze(1).detach() for t in found], expected)
    elif call == 'grad':
        found = grad(scalar)(of_weights)
        with plain():
            theirs = torch.autograd.grad(scalar(of_weights), list(of_weights.values()))
        same([found[name] for name in of_weights], list(theirs))
    elif call == 'compile':
        compiled = torch.compile(forward, backend='aot_eager', fullgraph=True)
        found = compiled(*inputs)
        same([t.detach() for t in found], expected)
        grads = torch.autograd.grad(loss(list(found)), list(unit.parameters()))
        with plain():
            same(list(grads), list(torch.autograd.grad(loss(run(unit, inputs)), list(unit.parameters()))))
    elif call == 'forward-mode':
        _, slope = torch.func.jvp(forward, tuple(inputs), tuple(torch.ones_like(y) for y in inputs))
        step = 1e-6
        with plain(), torch.no_grad():
            ahead, behind = (forward(*(y + sign * step for y in inputs)) for sign in (1, -1))
        same([t.detach() for t in slope], [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)], 1e-7)
    else:
        unit.requires_grad_(False)
        traced = torch.jit.trace(forward, tuple(inputs), check_trace=False)
        same([t.detach() for t in traced(*inputs)], expected)


class Stepping(nn.Module):
    """A cell whose forward is one step."""

    def __init__(self, unit: DIALSTM) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, y: Tensor, state: Any) -> Any:
        return self.unit.step(y, state)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    """The state is float32; with autocast, and weights in half precision, as in the plain formulas."""
    unit, inputs = cell(dtype), descriptors(3, dtype=dtype)

    def found() -> list[Tensor]:
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outputs = run(unit, inputs)
        return [t.detach() for t in (*outputs, *torch.autograd.grad(loss(outputs), [*inputs, *unit.parameters()]))]

    ours = found()
    with plain():
        theirs = found()
    half = autocast or dtype == torch.bfloat16
    assert ours[0].dtype == torch.float32
    same(ours, theirs, 0.05 if half else 1e-5)


def test_hooks_and_other_layers_are_used() -> None:
    unit, inputs = cell(), descriptors(2)
    expected = run(unit, inputs)
    calls: list[Any] = []
    handle = unit.hh[0].register_forward_hook(lambda module, args, y: calls.append(y))
    same(run(unit, inputs), expected)
    assert len(calls) == 2
    handle.remove()
    nn.utils.parametrizations.weight_norm(unit.ih[2])
    same(run(unit, inputs), expected)
    grads = torch.autograd.grad(loss(run(unit, inputs)), list(unit.parameters()))
    assert all(g.isfinite().all() for g in grads)
    assert len(grads) == 9


def test_the_weights_of_a_run_are_gathered_once_and_let_go() -> None:
    made: list[weakref.ref] = []
    start = LateWeights.__init__

    def watched(self: LateWeights, *args: Any) -> None:
        start(self, *args)
        made.append(weakref.ref(self))

    model = plugged(DIA)
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LateWeights, '__init__', watched)
            y = model(images())
        assert len(made) == 3  # stages
        assert all(ref() is not None for ref in made)
        y.sum().backward()
        del y
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()


@pytest.mark.parametrize('around', [None, BY_BLOCK], ids=['plain', 'checkpointed'])
def test_models_give_the_gradients_of_the_plain_formulas(around: Any) -> None:
    model, x = plugged(DIA, training=False), images()
    other = copy.deepcopy(model)
    model.around = around
    ours = results(model, x)
    with plain():
        theirs = results(other, x)
    assert_same(ours, theirs, 1e-12)


def count(call: Callable[[], Any]) -> int:
    with Launches() as launches:
        call()
    return launches.number


def test_operators_of_a_site() -> None:
    """Beyond the products, a site takes few: the sixth site less the fifth, forward and backward."""
    unit = cell()

    def step(sites: int) -> None:
        loss(run(unit, descriptors(sites))).backward()

    def of_a_site() -> int:
        return count(partial(step, 6)) - count(partial(step, 5))

    with plain():
        before = of_a_site()
    assert of_a_site() <= before - 13
