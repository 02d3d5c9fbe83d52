"""Corners of the state and of the fused form that once went wrong, or easily would."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from bench.forms import plain_form as plain
from conftest import randomise
from helpers.shared import ASR_DIA, BY_BLOCK, DIA, NOISE, Net, assert_same, images, plugged, results, unet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from asr_downstream import AsrError, FoldError, PlugError, fold, plug, rebind, record, verify
from asr_downstream.attention import SE
from asr_downstream.plugging.layers import Plugged
from asr_downstream.registry import ATTENTIONS

SPECS = pytest.mark.parametrize('spec', [DIA, ASR_DIA], ids=['DIA', 'ASR-DIA'])
SE_SPEC = dict(type='Attention', attention=dict(type='SE', reduction=2))


class Wide(nn.Module):
    """Two stages of one width; ``order`` is that of the blocks, ``around`` wraps their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(3)) for _ in 'ab')
        self.around: dict[int, Any] = {}
        self.order = list(range(6))

    def forward(self, x: Tensor) -> Tensor:
        blocks = [*self.down, *self.up]
        for index in self.order:
            call = self.around.get(index, self.around.get(-1, lambda block, x: block(x)))
            x = x + call(blocks[index], x).tanh()
        return x


def wide(spec: dict, **change: Any) -> Wide:
    model = Wide().double()
    plug(model, dict(spec, sites=['*.0'], **change))
    return randomise(model)


LAST: list[Tensor] = []


def maps() -> Tensor:
    LAST[:] = [torch.randn(2, 4, 5, 5, dtype=torch.float64).requires_grad_()]
    return LAST[0]


@pytest.mark.parametrize('share', ['stage', 'width', [['down.*', 'up.*']], [['up.2.*', 'down.*'], ['up.[01].*']]])
def test_asr_folds_whatever_is_shared(share: Any) -> None:
    model = wide(ASR_DIA, share=share).eval()
    x = maps()
    folded, _ = fold(model)
    assert verify(model, folded, x).relative < 1e-10
    with record(model) as seen, torch.no_grad():
        model(x)
    for path, layer in model.named_modules():
        if isinstance(layer, Plugged):
            torch.testing.assert_close(seen.gates[path][0][0], layer.constant())


@SPECS
@pytest.mark.parametrize('share', ['stage', 'width'])
@pytest.mark.parametrize('up', [('UpBlock2D', 'AttnUpBlock2D'), ('AttnUpBlock2D', 'UpBlock2D')], ids=['UA', 'AU'])
def test_checkpointing_finds_the_site_before_past_skip_connections(spec: dict, share: str, up: tuple) -> None:
    model = unet(block_out_channels=(32, 32), down_block_types=('DownBlock2D', 'DownBlock2D'), up_block_types=up)
    plug(model.double(), dict(spec, share=share))
    randomise(model)
    run = partial(results, model, NOISE[0], run=lambda x: model(x, NOISE[1]).sample)
    expected = run()
    model.enable_gradient_checkpointing()
    assert_same(run(), expected)


@SPECS
@pytest.mark.parametrize('order', [[0, 1, 1, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [0, 2, 3, 3, 5, 0, 1]], ids=str)
@pytest.mark.parametrize('share', ['stage', 'width'])
def test_one_rule_in_forward_and_recompute(spec: dict, order: list[int], share: str) -> None:
    model = wide(spec, share=share)
    model.order = order
    x = maps()
    expected = results(model, x)
    model.around = {-1: BY_BLOCK}
    assert_same(results(model, x), expected)


def test_a_site_that_runs_again_starts_from_zero() -> None:
    model = wide(DIA)
    model.order = [0, 1, 1, 3, 4, 5]
    with record(model) as seen:
        model(maps())
    first, second = seen.states['down.1.0']
    unit = model.shared_attention['down'].attention
    member = model.down[1][0].dynamic[0].attention
    assert member.position == 1
    i, _, g, _ = (unit.ih(seen_input(model, 2)) + unit.hh(torch.zeros(1, 4, dtype=torch.float64))).chunk(4, 1)
    torch.testing.assert_close(second[1], i.sigmoid() * g.tanh())
    assert not torch.allclose(first[1], second[1])


def descriptor(x: Tensor) -> Tensor:
    """Mean of a map; a descriptor is one already."""
    return x if x.dim() == 2 else x.mean((2, 3))


def seen_input(model: Wide, call: int) -> Tensor:
    """Descriptor of the ``call``-th block that runs, on the same maps."""
    found: list[Tensor] = []
    handles = [
        layer.dynamic[0].attention.register_forward_pre_hook(lambda m, args: found.append(descriptor(args[0])))
        for layer in model.modules()
        if isinstance(layer, Plugged)
    ]
    model(LAST[0])
    for handle in handles:
        handle.remove()
    return found[call]


def test_a_forward_is_freed_without_the_garbage_collector() -> None:
    for spec in (DIA, ASR_DIA):
        model = wide(spec)
        gc.collect()
        gc.disable()
        try:
            x = maps() * 1
            x.grad_fn.metadata['probe'] = probe = Probe()
            alive = weakref.ref(probe)
            y = model(x)
            del probe, x
            assert alive() is not None
            del y
            assert alive() is None
        finally:
            gc.enable()


class Probe:
    """Lives as long as the graph that it is put into."""


def test_autocast_does_not_touch_the_gates_of_learned_inputs() -> None:
    model = wide(ASR_DIA).float()
    found = []
    for enabled in (False, True):
        with record(model) as seen, torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            model(maps().float())
        found.append([gates[0] for gates in seen.gates.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('some', [[0], [1], [0, 1]])
def test_reentrant_checkpointing_of_some_blocks_is_refused_or_right(some: list[int]) -> None:
    around = {index: partial(checkpoint, use_reentrant=True) for index in some}
    model = wide(DIA)
    x = maps()
    expected = results(model, x)
    model.around = around
    with pytest.raises(AsrError, match='use_reentrant=False'):
        results(model, x)
    model.around = {}
    assert_same(results(model, x), expected)
    model = wide(ASR_DIA)
    expected = results(model, x)
    model.around = around
    assert_same(results(model, x), expected)


@pytest.mark.parametrize('frozen', ['gates', 'all but one block'])
def test_checkpointing_of_constant_gates_that_do_not_train(frozen: str) -> None:
    model = wide(ASR_DIA)
    for name, p in model.named_parameters():
        own = 'psi' in name or 'shared_attention' in name
        p.requires_grad_(not own if frozen == 'gates' else name.startswith('down.2'))
    x = maps().detach()
    expected = results(model, x)
    model.around = {-1: BY_BLOCK}
    assert_same(results(model, x), expected)


def test_a_part_without_gradients_is_fine_where_the_unit_does_not_train() -> None:
    model = wide(DIA)
    model.shared_attention.requires_grad_(False)

    def frozen(block: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return block(x)

    expected = model(x := maps())
    model.around = {0: frozen}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize('spec', [pytest.param(DIA, id='DIA'), pytest.param(ASR_DIA, id='ASR-DIA')])
def test_compiled_and_eager_parts_share_the_state(spec: dict) -> None:
    model = wide(spec)
    x = maps()
    expected = results(model, x)
    part = copy.deepcopy(model)
    part.down[1].compile(backend='eager')
    assert_same(results(part, x), expected)
    broken = copy.deepcopy(model)
    broken.around = {1: torch.compiler.disable(lambda block, x: block(x))}
    assert_same(results(broken, x, run=torch.compile(broken, backend='eager')), expected)


@pytest.mark.parametrize('attention', ['SRM', 'CBAM'])
def test_shared_norms_survive_a_conversion_to_sync_bn(attention: str) -> None:
    model = plugged(dict(type='DIA', attention=dict(type=attention)))
    x = images()
    model.eval()
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model).train())
    rebind(converted)
    converted.eval()
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    torch.testing.assert_close(converted(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in converted.state_dict().items())
    converted.float()(x.float())


def test_a_unit_needs_its_place() -> None:
    model = Net()
    model.shared_attention = nn.Linear(1, 1)
    keys = model.state_dict().keys()
    with pytest.raises(PlugError, match=r"attribute 'shared_attention' of its own"):
        plug(model, DIA)
    assert model.state_dict().keys() == keys
    assert not any(isinstance(m, Plugged) for m in model.modules())


def test_a_part_that_keeps_gates_is_not_folded_without_its_unit() -> None:
    model = plugged([dict(type='ASR', attention=dict(type='SE')), DIA], training=False)
    with pytest.raises(FoldError, match='fold the whole model'):
        fold(model.layer1, dynamic='keep')
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    part = plugged(ASR_DIA, training=False).layer1
    assert verify(part, fold(part)[0], x).relative < 1e-10


def test_units_of_equal_stages_start_differently() -> None:
    model = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in ((4, 4), (4, 8), (8, 4), (4, 8))))
    plug(model, dict(DIA, sites=['*']))
    first, second = (model[-1][name].attention.ih[0].weight for name in ('model', 'model_3'))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_record_follows_the_model_and_not_its_copies() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='SE'), share='stage'), training=False)
    with record(model) as seen:
        model(images())
    assert {len(gates) for gates in seen.gates.values()} == {1}
    model = plugged(DIA, training=False)
    with record(model) as seen:
        duplicate = copy.deepcopy(model)
        duplicate(images())
    duplicate(images())
    assert {len(gates) for gates in (*seen.gates.values(), *seen.states.values())} == {0}


# The fused form, ``memory="low"``


def normed(attention: str = 'SE', **kwargs: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    plug(model, dict(type='Attention', attention=dict(type=attention, **kwargs), sites=['1'], memory='low'))
    return randomise(model)


@pytest.mark.parametrize('training', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fused_equals_plain_with_second_derivatives(training: bool) -> None:
    model = normed(reduction=2).train(training)
    parameters = dict(model.named_parameters())
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(model), dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))
    found = []
    for form in (model, plain(model)):
        y = form(x)
        first = torch.autograd.grad(y.square().sum(), [x, *form.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *form.parameters()])
        found.append([y, *first, *second])
    assert_same(*found)


def test_a_pass_that_leaves_the_map_out_leaves_nothing_behind() -> None:
    fused = normed(reduction=2)
    grads = []
    for model in (fused, plain(fused)):
        kept: list[Tensor] = []
        model[1].dynamic[0].attention.register_forward_hook(lambda m, i, out, kept=kept: kept.append(out))
        torch.manual_seed(3)
        y = model(torch.randn(2, 3, 5, 5, dtype=torch.float64))
        of_gates = list(model[1].dynamic.parameters())
        torch.autograd.grad(y.square().sum(), of_gates, retain_graph=True)
        assert getattr(y.grad_fn, 'link', None) is None or y.grad_fn.link.sent is None  # holds no map
        kept[0].sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_same(*grads)


def test_eval_then_training_then_one_backward() -> None:
    model = normed(reduction=2)
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    a, b = model.eval()(x), model.train()(x)  # the second changes the running statistics of the first
    (a.square().sum() + b.square().sum()).backward()
    other.eval()(x).square().sum().backward()
    other.train()(x).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


@pytest.mark.parametrize('shape', [(0, 3, 5, 5), (1, 3, 5, 5), (2, 3, 1, 1)])
def test_small_batches(shape: tuple[int, ...]) -> None:
    model = normed(reduction=2).eval()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(model)(x))


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_memory_formats(layout: torch.memory_format) -> None:
    model = normed(reduction=2).to(memory_format=layout)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64).to(memory_format=layout)
    other = plain(model)
    assert_same(results(model, x), results(other, x))


def test_forward_mode() -> None:
    model = normed(reduction=2).eval()
    x, t = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(found, torch.autograd.functional.jvp(plain(model), x, t)[1])


@pytest.mark.parametrize('mean', [0.0, 100.0, 1000.0])
def test_fused_keeps_the_precision_of_the_stock_statistics(mean: float) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    plug(model, dict(SE_SPEC, sites=['0'], memory='low'))
    x = torch.randn(8, 4, 16, 16) + mean
    exact = copy.deepcopy(model).double()(x.double())
    errors = [float((m(x).double() - exact).detach().norm() / exact.detach().norm()) for m in (model, plain(model))]
    assert errors[0] <= 2 * errors[1] + 1e-6


def test_an_attention_that_pools_otherwise_is_not_fused() -> None:
    @ATTENTIONS.register_module()
    class Highest(SE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(2).amax(-1) if x.dim() > 2 else x)

    try:
        model = normed('Highest', reduction=2)
        assert not model[1].dynamic[0].of_mean
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(model(x), plain(model)(x))
    finally:
        ATTENTIONS.module_dict.pop('Highest')
