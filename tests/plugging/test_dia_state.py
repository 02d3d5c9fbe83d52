"""The state of a shared unit: equal to a loop written from the equations, and safe under what users switch on."""

from __future__ import annotations

import copy
import io
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from helpers.shared import (
    ASR_DIA,
    BY_BLOCK,
    DIA,
    SPECS,
    assert_same,
    every_spec,
    images,
    plugged,
    recurrent_spec,
    results,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import AsrError, record
from asr_downstream.plugging.gating import recurrence as state


def cell(unit: Any, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The DIA-LSTM cell, from its equations."""
    w = dict(unit.attention.named_parameters())
    a = torch.relu(y @ w['ih.0.weight'].T + w['ih.0.bias']) @ w['ih.2.weight'].T + w['ih.2.bias']
    e = torch.relu(h @ w['hh.0.weight'].T + w['hh.0.bias']) @ w['hh.2.weight'].T + w['hh.2.bias']
    n = y.shape[1]
    i, f, g, o = ((a + e)[:, k * n : (k + 1) * n] for k in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.sigmoid(c), c


def reference(model: Any, x: Tensor) -> Tensor:
    """Forward of a network with DIA or ASR(DIA), block by block: stock layers, then the map times its gates."""
    x = model.relu(model.bn1(model.conv1(x)))
    for number in (1, 2, 3):
        unit = model.shared_attention[f'layer{number}']
        h = c = torch.zeros(1, unit.attention.channels, dtype=x.dtype)
        for block in getattr(model, f'layer{number}'):
            shortcut = x if block.downsample is None else block.downsample(x)
            y = model.relu(block.bn1(block.conv1(x)))
            y = model.relu(block.bn2(block.conv2(y)))
            y = nn.BatchNorm2d.forward(block.bn3, block.conv3(y))
            h, c = cell(unit, y.mean((2, 3)) if block.bn3.gate is None else block.bn3.gate[0].psi, h, c)
            x = torch.relu(y * h[:, :, None, None] + shortcut)
    return model.fc(x.mean((2, 3)))


@recurrent_spec
@pytest.mark.parametrize('training', [True, False])
def test_equals_a_plain_loop_from_the_equations(spec: Any, training: bool) -> None:
    model = plugged(spec, training)
    other = copy.deepcopy(model)
    x = images()
    assert_same(results(model, x), results(other, x, run=partial(reference, other)))
    with torch.no_grad():
        assert_same([model.eval()(x)], [reference(other.eval(), x)])


def test_the_reference_notices_a_lost_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plugged(DIA)
    other = copy.deepcopy(model)
    monkeypatch.setattr(state, 'continued', lambda left, place: None)
    x = images()
    with pytest.raises(AssertionError):
        assert_same(results(model, x), results(other, x, run=partial(reference, other)))


@every_spec
@pytest.mark.parametrize('calls', [1, 2, 3])
def test_non_reentrant_checkpointing_of_blocks(spec: Any, calls: int) -> None:
    model = plugged(spec, training=False)
    inputs = [images(batch) for batch in range(2, 2 + calls)]  # several forwards, then one backward
    expected = results(model, *inputs)
    model.around = BY_BLOCK
    assert_same(results(model, *inputs), expected)


@recurrent_spec
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_of_whole_stages_and_nested(spec: Any, reentrant: bool) -> None:
    model = plugged(spec, training=False)
    x = images()
    expected = results(model, x)

    def staged(x: Tensor) -> Tensor:
        x = model.relu(model.bn1(model.conv1(x)))
        for stage in (model.layer1, model.layer2, model.layer3):
            x = checkpoint(stage, x, use_reentrant=reentrant)
        return model.fc(x.mean((2, 3)))

    assert_same(results(model, x, run=staged), expected)
    if not reentrant:
        model.around = BY_BLOCK
        assert_same(results(model, x, run=lambda x: checkpoint(model, x, use_reentrant=False)), expected)


def test_reentrant_checkpointing_of_blocks_is_refused() -> None:
    model = plugged(DIA, training=False)
    model.around = partial(checkpoint, use_reentrant=True)
    with pytest.raises(AsrError, match=r'layer\d: .*use_reentrant=False'):
        results(model, images())
    model.around = None
    assert_same(results(model, x := images()), results(copy.deepcopy(model), x))


def test_learned_inputs_need_no_forward_and_so_no_refusal() -> None:
    model = plugged(ASR_DIA, training=False)
    x = images()
    expected = results(model, x)
    model.around = partial(checkpoint, use_reentrant=True)
    assert_same(results(model, x), expected)


@every_spec
def test_two_forwards_before_one_backward_and_twice_in_one_graph(spec: Any) -> None:
    model = plugged(spec, training=False)
    a, b = images(2), images(4)
    model.zero_grad()
    first, second = model(a), model(b)
    second.square().sum().backward()
    first.square().sum().backward()
    apart = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    together = results(model, a, b)
    assert_same(together[2 : 2 + len(apart)], apart)
    assert_same(together[:2], [model(a), model(b)])
    both = results(model, a, run=lambda x: model(model(x)[:, :3, None, None] + x[:, :, :1, :1] * 0 + x))
    other = copy.deepcopy(model)
    if spec is not SPECS['DIA-SRM']:
        run = partial(reference, other)
        assert_same(both, results(other, a, run=lambda x: run(run(x)[:, :3, None, None] + x[:, :, :1, :1] * 0 + x)))


@recurrent_spec
def test_an_exception_in_the_middle_leaves_nothing(spec: Any) -> None:
    model = plugged(spec, training=False)
    x = images()
    expected = results(model, x)
    handle = model.layer2[2].conv1.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(5))
    assert not any(unit.slot.left for unit in model.shared_attention.values())
    handle.remove()
    assert_same(results(model, x), expected)


@recurrent_spec
def test_nothing_is_left_after_a_forward_and_a_part_may_run_alone(spec: Any) -> None:
    model = plugged(spec, training=False)
    x = images()
    expected = model(x)
    model.layer1[0](torch.randn(4, 8, 6, 6, dtype=torch.float64))  # leaves a state of another batch size
    torch.testing.assert_close(model(x), expected)
    assert not any(unit.slot.left for unit in model.shared_attention.values())


@every_spec
def test_the_batch_size_may_change(spec: Any) -> None:
    model = plugged(spec, training=False)
    xs = [images(b) for b in (1, 5, 2)]
    joined = model(torch.cat(xs))
    torch.testing.assert_close(torch.cat([model(x) for x in xs]), joined)


@every_spec
def test_threads_do_not_mix(spec: Any) -> None:
    model = plugged(spec, training=False)
    xs = [images(b % 3 + 1) for b in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    found: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(xs))

    def wait(*_: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(5)

    model.layer2[1].conv1.register_forward_pre_hook(wait)  # all threads meet in the middle of a stage

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = [model(xs[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for index, expected_one in enumerate(expected):
        for y in found[index]:
            torch.testing.assert_close(y, expected_one)


@every_spec
def test_copies_pickles_and_state_dicts(spec: Any) -> None:
    model = plugged(spec, training=False)
    x = images()
    expected = results(model, x)
    model.layer2[1].conv1.register_forward_pre_hook(lambda *_: None)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(results(duplicate, x), expected)
    buffer = io.BytesIO()
    torch.save(duplicate.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    pointers = [t.data_ptr() for t in state.values() if t.numel()]
    assert len(set(pointers)) == len(pointers)  # nothing is there twice
    model.load_state_dict(state, strict=True)
    assert_same(results(model, x), expected)


@recurrent_spec
def test_a_whole_model_pickles_and_a_part_copies_with_its_unit(spec: Any) -> None:
    model = plugged(spec, training=False)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = images()
    assert_same(results(torch.load(buffer, weights_only=False), x), results(model, x))
    part = copy.deepcopy(model.layer1)
    z = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(part(z), model.layer1(z))


@every_spec
def test_functional_call_and_func_grad(spec: Any) -> None:
    model, other = plugged(spec, training=False), plugged(spec, training=False)
    x = images()
    parameters = {n: p.detach() for n, p in other.named_parameters()}
    buffers = dict(other.named_buffers())
    call = partial(torch.func.functional_call, model)
    torch.testing.assert_close(call((parameters, buffers), (x,)), other(x))
    grads = torch.func.grad(lambda p: call((p, buffers), (x,)).square().sum())(parameters)
    expected = results(other, x)[1:]
    assert_same(list(grads.values()), expected[: len(grads)])


@pytest.mark.slow  # test_dia_corners and test_plug compile as well
@pytest.mark.parametrize('spec', [pytest.param(s, id=n) for n, s in SPECS.items()])
def test_torch_compile(spec: Any) -> None:
    model = plugged(spec)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
    for batch in (3, 2):
        x = images(batch)
        assert_same(results(model, x), results(other, x, run=compiled))


@every_spec
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_state_in_full_precision(spec: Any, dtype: torch.dtype) -> None:
    model = plugged(spec, training=False).float()
    x = images().float()
    expected = model(x)
    with record(model) as seen, torch.autocast('cpu', dtype=dtype):
        y = model(x)
    y.float().square().mean().backward()
    assert bool(seen.states) == bool('DIALSTM' in str(spec))
    assert {t.dtype for left in seen.states.values() for t in left[0]} <= {torch.float32}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert float((y.detach().float() - expected.detach()).norm() / expected.detach().norm()) < 0.1
    half = copy.deepcopy(model).to(dtype)
    with record(half) as seen:
        assert half(x.to(dtype)).dtype == dtype
    assert {t.dtype for left in seen.states.values() for t in left[0]} <= {torch.float32}
