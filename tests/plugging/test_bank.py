"""The bank of constant gates: what a site computes by itself, in a few operators for all, and never a stale gate."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.cases import ATTENTIONS
from helpers.plugged import ASR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import fold, plug, rebind
from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.measure.cost import saved_bytes
from asr_downstream.measure.launches import Launches
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.plugging.bank import groups as planning
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.plugging.bank import regained as regaining
from asr_downstream.plugging.layers import Plugged
from asr_downstream.registry import ATTENTIONS as REGISTRY

ATOL = 1e-12
DIA = dict(type='ASR', attention=dict(type='DIALSTM'))
SPECS: dict[str, Any] = {
    **{name: dict(type='ASR', attention=dict(type=name)) for name in ATTENTIONS},
    'repeat': {**ASR, 'repeat': 3},
    'composed': [dict(type='ASR', attention=dict(type='ECA')), dict(type='ASR', attention=dict(type='SE'))],
    'before an attention': [ASR, dict(type='Attention', attention=dict(type='SE', reduction=4))],
    'without biases': dict(type='ASR', attention=dict(type='SE', reduction=4, bias=False)),
    'recurrent': DIA,
    'shared': {**ASR, 'share': 'stage'},
    'shared by width': {**DIA, 'share': 'width'},
    'shift': {**ASR, 'shift': True},
    'repeat and shift': {**ASR, 'repeat': 2, 'shift': True},
    'recurrent and shift': {**DIA, 'shift': True},
    'shift last': [ASR, {**ASR, 'shift': True}],
    'shift of convolutions': {**ASR, 'sites': ['layer*.conv2'], 'shift': True},
    'inputs': {**ASR, 'sites': ['layer*.conv2'], 'side': 'input'},
    'inputs, repeat': {**ASR, 'sites': ['layer*.conv2'], 'side': 'input', 'repeat': 2},
    'inputs, recurrent': {**DIA, 'sites': ['layer*.conv2'], 'side': 'input'},
    'both sides': [{**ASR, 'sites': ['layer*.conv2']}, {**ASR, 'sites': ['layer*.conv2'], 'side': 'input'}],
    'both sides and shift': [
        {**ASR, 'sites': ['layer*.conv2'], 'shift': True},
        {**ASR, 'sites': ['layer*.conv2'], 'side': 'input'},
    ],
}


class Mixed(nn.Module):
    """Convolutions, a transposed one, linear layers and norms as sites, in two numbered sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=i != 1), nn.GroupNorm(2, 8)]) for i in range(3)
        )
        self.up = nn.ModuleList([nn.ModuleList([nn.ConvTranspose2d(8, 8, 1)])])
        self.tokens = nn.ModuleList(nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in self.convolutions:
            x = x + norm(convolution(x)).relu()
        x = self.up[0][0](x).flatten(2).transpose(1, 2)
        for norm, linear in self.tokens:
            x = x + linear(norm(x)).tanh()
        return x


class Checkpointed(ResNet):
    """Each block is computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x).relu()
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x.mean((2, 3))


class Whole(Checkpointed):
    """The same without."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return x.mean((2, 3))


def small(kind: type = ResNet, bias: bool = False) -> Any:
    torch.manual_seed(0)
    model = kind(BasicBlock, 2, width=8)
    for module in model.modules():
        if bias and isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return model


def moved(model: nn.Module) -> nn.Module:
    """Take all parameters away from where they start, zeros and ones too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def plugged(spec: Any = ASR, kind: type = ResNet, dtype: torch.dtype = torch.float64) -> Any:
    specs = spec if isinstance(spec, list) else [spec]
    model = small(kind, bias=any(s.get('shift') and 'sites' in s for s in specs)).to(dtype)
    plug(model, spec)
    return moved(model)


def maps(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, 16, 16, dtype=dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Outputs, gradients and buffers of a training step of a copy."""
    enabled = vars(model)[bank.BANK].enabled
    model = copy.deepcopy(model)
    assert vars(model)[bank.BANK].enabled is enabled
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return {
        'y': y.detach(),
        'x': x.grad,
        **{f'gradient of {name}': p.grad for name, p in model.named_parameters()},
        **{name: b.clone() for name, b in model.named_buffers()},
    }


def trained(found: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Without running statistics, which are updated twice where a block runs twice."""
    return {name: value for name, value in found.items() if 'running' not in name and 'tracked' not in name}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = ATOL) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert torch.allclose(other, value, tolerance, tolerance), name


def by_site(model: nn.Module, x: Tensor, call: Callable[..., Any] = step) -> Any:
    """The same by a copy of the model whose sites compute their own gates."""
    alone = copy.deepcopy(model)
    with bank.off(alone):
        return call(alone, x)


def served(model: nn.Module) -> set[nn.Module]:
    """Sites that the bank serves here and now."""
    return set(vars(model)[bank.BANK].ready(model))


def gated(model: nn.Module) -> list[Any]:
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Plugged)]
    return [layer for layer in layers if layer.gate is not None]


def pause(model: Any, then: Callable[[], Any]) -> Any:
    """Call something before the second stage runs."""
    return model.layer2[0].register_forward_pre_hook(lambda *_: then() and None)


@pytest.mark.parametrize('preserve', [False, True])
@pytest.mark.parametrize('name', SPECS)
def test_a_step_is_what_sites_compute_by_themselves(name: str, preserve: bool) -> None:
    spec = SPECS[name]
    specs = [{**s, 'preserve': preserve} for s in (spec if isinstance(spec, list) else [spec])]
    if name == 'LayerScale':
        specs[0]['attention'] = dict(type='LayerScale', init_value=0.3)
    model = plugged(specs)
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(maps()), by_site(model, maps(), lambda m, x: m(x)), ATOL, ATOL)


@pytest.mark.parametrize('attention', ['SE', 'ECA', 'SPA'])
def test_convolutions_linear_layers_and_norms(attention: str) -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    sites = ['convolutions.*.0', 'convolutions.*.1', 'up.0.0', 'tokens.*.0', 'tokens.*.1']
    plug(model, dict(type='ASR', attention=dict(type=attention), sites=sites))
    moved(model)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert served(model) == set(gated(model))
    assert_same(step(model, x), by_site(model, x))
    with torch.no_grad():
        assert torch.allclose(model(x), by_site(model, x, lambda m, x: m(x)), ATOL, ATOL)


def test_sites_that_run_close_to_each_other_are_a_group() -> None:
    kinds = {
        'unet.down_blocks.0.resnets.0.conv2': 32, 'unet.down_blocks.1.resnets.0.conv2': 64,
        'unet.down_blocks.2.resnets.0.conv2': 64, 'unet.up_blocks.0.resnets.0.conv2': 64,
        'unet.up_blocks.1.resnets.0.conv2': 32, 'unet.mid_block.resnets.0.conv2': 64,
    }  # fmt: skip
    ordered = {path: kinds[path] for path in planning.in_order(kinds)}
    assert sorted([path.split('.')[1] for path in group] for group in planning.stages(ordered)) == [
        ['down_blocks'],
        ['down_blocks', 'down_blocks', 'mid_block', 'up_blocks'],
        ['up_blocks'],
    ]
    alternating = {f'layer{i}.{j}.bn{k}': 4 * k for i in (1, 2) for j in range(2) for k in (1, 2)}
    assert sorted(map(len, planning.stages(alternating))) == [2, 2, 2, 2]


def test_a_shift_that_later_gates_scale_is_left_to_its_site() -> None:
    model = plugged([{**ASR, 'shift': True}, ASR])
    assert not served(model)
    assert_same(step(model, maps()), by_site(model, maps()))


def test_shifts_cost_one_operator_a_group() -> None:
    """In the backward pass nothing: the gradient of a shift is that of the bias."""
    counts = []
    for spec in (ASR, {**ASR, 'shift': True}):
        model = plugged(spec)
        with Launches() as launches:
            model(maps()).sum().backward()
        counts.append(launches.number)
    groups = vars(model)[bank.BANK].groups(model)
    assert counts[1] - counts[0] == len(groups) == 3


def test_a_plan_is_made_again_when_a_shift_comes() -> None:
    model = plugged()
    model(maps())
    for layer in gated(model)[:3]:  # in the second group of one site alone
        layer.gate[0].learn_shift(layer.bias)
        nn.init.normal_(layer.gate[0].bias)
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))


def test_groups_are_those_of_a_stage_and_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's gradients come at its end; with one for all, data-parallel training could send nothing before."""
    model = plugged()
    assert [len(g.layers) for g in vars(model)[bank.BANK].groups(model)] == [2, 2, 2]
    monkeypatch.setattr(planning, 'LONGEST', 1)
    model = copy.deepcopy(model)
    assert [len(g.layers) for g in vars(model)[bank.BANK].groups(model)] == [1] * 6
    assert [len(g.layers) for g in vars(plugged(DIA))[bank.BANK].plan] == [2, 2, 2]  # a state runs along


@pytest.mark.parametrize(
    'name', ['SE', 'ECA', 'CBAM', 'repeat', 'recurrent', 'shared', 'shift', 'recurrent and shift', 'inputs']
)
def test_preserve_starts_at_one_exactly(name: str) -> None:
    stock = small()
    model = copy.deepcopy(stock)
    plug(model, {**SPECS[name], 'preserve': True})
    for ready in vars(model)[bank.BANK].ready(model).values():
        v = ready.constants.inputs if name == 'inputs' else ready.v
        assert torch.equal(v, torch.ones_like(v))
    x = maps(torch.float32)
    assert torch.equal(model.eval()(x), stock.eval()(x))


def test_references_of_trained_gates_stay() -> None:
    """A second plug takes the references of its own gates only."""
    model = small()
    plug(model, {**ASR, 'sites': ['layer1.0.bn2'], 'preserve': True})
    moved(model)
    before = model.layer1[0].bn2.gate[0].reference
    plug(model, {**ASR, 'sites': ['layer1.1.bn2'], 'preserve': True})
    assert model.layer1[0].bn2.gate[0].reference is before
    assert served(model) == {model.layer1[0].bn2, model.layer1[1].bn2}


class Scaled(ChannelAttention):
    """An attention of a user: its attribute may change, and its forward draws if it is told to."""

    def __init__(self, channels: int, factor: float = 1.0, drop: float = 0.0) -> None:
        super().__init__(channels)
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(channels))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.weight * pool(x) * self.factor).sigmoid()


@pytest.fixture
def registered() -> Any:
    REGISTRY.register_module(module=Scaled)
    yield
    REGISTRY._module_dict.pop('Scaled')


@pytest.mark.usefixtures('registered')
def test_attentions_of_users() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='Scaled')))
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))
    for layer in gated(model):  # as a schedule would
        layer.gate[0].attention.factor = 3.0
    assert_same(step(model, maps()), by_site(model, maps()))
    model.layer1[0].bn2.gate[0].attention.factor = 5.0  # not like the others any more
    assert_same(step(model, maps()), by_site(model, maps()))
    model.layer2[0].bn2.gate[0].attention.drop = nn.Identity()
    assert_same(step(model, maps()), by_site(model, maps()))
    served(model)
    assert len(vars(model)[bank.BANK].plan) == 5


class Wrong(Scaled):
    """What it says of many sites is not what it computes for one."""

    def batched(self, parameters: dict[str, Tensor], psi: Tensor) -> Tensor:
        return (parameters['weight'] * psi.squeeze(1)).sigmoid() * 0.5


class Replaced(Wrong):
    """Its forward is another one than that of the method, which so does not count."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * pool(x)


def test_what_an_attention_says_of_many_sites_is_tried() -> None:
    for kind, count in ((Wrong, 0), (Replaced, 6)):
        REGISTRY.register_module(module=kind)
        try:
            model = plugged(dict(type='ASR', attention=dict(type=kind.__name__)))
        finally:
            REGISTRY._module_dict.pop(kind.__name__)
        assert len(served(model)) == count
        assert_same(step(model, maps()), by_site(model, maps()))


@pytest.mark.usefixtures('registered')
def test_random_attentions_are_left_to_their_sites() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='Scaled', drop=0.5)))
    state = torch.get_rng_state()
    assert served(model.train()) == set()
    assert torch.equal(torch.get_rng_state(), state)


def stepped(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(maps()).square().mean().backward()
    optimiser.step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.1 if 'psi' in k else v for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.1 if 'psi' in k else v for k, v in model.state_dict().items()}, assign=True)


def swapped(model: nn.Module) -> None:
    """As MMEngine's EMA swaps weights."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + 0.1)


def replaced(model: Any) -> None:
    gate, other = (layer.gate[0] for layer in gated(model)[:2])
    gate.attention = copy.deepcopy(other.attention)


@pytest.mark.parametrize('change', [stepped, loaded, assigned, swapped, replaced])
@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
def test_no_gate_is_stale(change: Callable[[nn.Module], None], spec: Any) -> None:
    if change is replaced and spec is DIA:
        pytest.skip('it has no attention of its own')
    model = plugged(spec).train()
    before = model(maps())
    change(model)
    after = model(maps())
    assert not torch.allclose(before, after, 1e-6, 1e-6)
    assert torch.allclose(after, by_site(model, maps(), lambda m, x: m(x)), ATOL, ATOL)
    assert_same(step(model, maps()), by_site(model, maps()))


def test_a_part_called_by_itself_computes_its_own() -> None:
    model = plugged().eval()
    model(maps())
    with torch.no_grad():
        for parameter in model.layer1.parameters():
            parameter.mul_(1.5)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    y = model.layer1(x)
    assert torch.allclose(y, by_site(model, x, lambda m, x: m.layer1(x)), ATOL, ATOL)
    y.sum().backward()
    assert model.layer1[0].bn2.gate[0].psi.grad.any()


def test_a_forward_in_another_thread_changes_nothing_here() -> None:
    """Two forwards are under way at once, and the gates have changed between their starts."""
    model = plugged(ASR, Whole).eval()
    expected = by_site(model, maps(), lambda m, x: m(x).detach())
    arrived, go = threading.Event(), threading.Event()
    here = threading.get_ident()
    thread = threading.Thread(target=lambda: model(maps()))

    def meanwhile() -> None:
        if threading.get_ident() != here:
            arrived.set()
            go.wait(60)
            return
        for name, parameter in model.named_parameters():
            if '.gate.' in name:
                parameter.data.add_(1.0)
        thread.start()
        arrived.wait(60)

    handle = pause(model, meanwhile)
    with torch.no_grad():
        found = model(maps())
    go.set()
    thread.join()
    handle.remove()
    assert torch.allclose(found, expected, ATOL, ATOL)
    assert not torch.allclose(model(maps()), expected, 1e-6, 1e-6)


@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
def test_recomputation_meets_the_same_tensors(spec: Any) -> None:
    expected = step(plugged(spec, Whole), maps())
    model = plugged(spec, Checkpointed)
    assert_same(trained(step(model, maps())), trained(expected), 1e-10)


def test_recomputation_under_the_reentrant_form() -> None:
    """Its first pass records no gradients, so its sites compute their own, twice."""
    expected = step(plugged(ASR, Whole), maps())
    model = plugged(ASR, Checkpointed)
    model.reentrant = True
    assert_same(trained(step(model, maps())), trained(expected), 1e-10)


@pytest.mark.parametrize('trained', ['', '.gate.'], ids=['all', 'gates'])
def test_recomputation_after_another_forward(trained: str) -> None:
    """Gradients of two batches before one backward pass, and an evaluation in between."""
    x, other = maps(), maps().flip(0) * 2
    model, whole = plugged(ASR, Checkpointed).eval(), plugged(ASR, Whole).eval()
    for name, parameter in [*model.named_parameters(), *whole.named_parameters()]:
        parameter.requires_grad_(trained in name)

    def both(m: nn.Module) -> list[Tensor | None]:
        loss = m(x).square().mean() + m(other).square().mean()
        with torch.no_grad():
            m(other)
        loss.backward()
        return [p.grad for p in m.parameters()]

    for found, expected in zip(both(model), both(whole), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, 1e-10, 1e-10)


def test_recomputation_of_a_part_called_by_itself() -> None:
    """The last forward of its sites had no bank, so their second one has none either."""
    model = plugged(ASR, Checkpointed).eval()
    model(maps()).sum().backward()
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    alone = copy.deepcopy(model)
    checkpoint(model.layer1[0], x, use_reentrant=False).square().mean().backward()
    alone.layer1[0](x).square().mean().backward()
    for p, q in zip(model.layer1[0].parameters(), alone.layer1[0].parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, 1e-10, 1e-10)


def test_recomputation_in_a_thread_of_the_backward_pass() -> None:
    """Devices compute backward passes in threads of their own."""
    expected = step(plugged(ASR, Whole).eval(), maps())
    model = plugged(ASR, Checkpointed).eval()
    loss = model(maps()).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for name, parameter in model.named_parameters():
        grad = expected[f'gradient of {name}']
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10)


def test_a_whole_model_is_recomputed_and_later_its_blocks() -> None:
    """All in one thread of backward passes, which so has seen forwards of its own."""
    model, whole = plugged(ASR, Checkpointed).eval(), plugged(ASR, Whole).eval()
    with ThreadPoolExecutor(1) as elsewhere:
        loss = checkpoint(model, maps(), use_reentrant=False).square().mean()
        elsewhere.submit(loss.backward).result()
        first = step(whole, maps())
        for m in (model, whole):
            for name, parameter in m.named_parameters():
                grad = first[f'gradient of {name}']
                assert m is whole or grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name
                parameter.data.mul_(1.2)
        model.zero_grad()
        elsewhere.submit(model(maps()).square().mean().backward).result()
    second = step(whole, maps())
    for name, parameter in model.named_parameters():
        grad = second[f'gradient of {name}']
        assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name


class Early(Whole):
    """Uses only some of its stages, and of the second only the first block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.bn1(self.conv1(x)).relu())
        return self.layer2[0](x).mean((2, 3))


class Late(Whole):
    """Leaves out the first block, from which a state would come."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1[1](self.bn1(self.conv1(x)).relu())).mean((2, 3))


@pytest.mark.parametrize('spec', [ASR, DIA])
def test_unused_sites_that_a_state_comes_from(spec: Any) -> None:
    model = plugged(spec, Late)
    found = step(model, maps())
    assert (found['gradient of layer1.0.bn2.gate.0.psi'] is None) == (spec is ASR)
    assert found['gradient of layer1.0.bn2.weight'] is None
    assert_same(found, by_site(model, maps()))


@pytest.mark.parametrize(
    'spec',
    [ASR, DIA, *(SPECS[name] for name in ('shared', 'composed', 'shift', 'recurrent and shift', 'inputs'))],
)
def test_unused_sites_have_no_gradient(spec: Any) -> None:
    model = plugged(spec, Early)
    found = step(model, maps())
    expected = by_site(model, maps())
    assert any(grad is None for grad in expected.values())
    unused = [grad for name, grad in found.items() if name.startswith('gradient of layer2.1.') and '.gate.' in name]
    assert unused
    assert all(grad is None for grad in unused)
    assert_same(found, expected)


def test_gradients_take_no_copy() -> None:
    """Every one has the layout of its parameter, so that it is handed over and not copied."""
    model = plugged(dtype=torch.float32)
    with Launches() as found:
        model(maps(torch.float32)).square().mean().backward()
    assert 'clone' not in found.of
    assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', ['SE', 'SPA', 'CBAM', 'SRM', 'repeat', 'recurrent'])
def test_large_stacks_are_made_again_and_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plugged(SPECS[name])
    model.eval()
    expected = step(model, maps())
    size = saved_bytes(model, lambda: model(maps()).square().mean())
    monkeypatch.setattr(regaining, 'KEPT', 0)
    assert_same(step(model, maps()), expected)
    stacked = sum(p.numel() * 8 for name, p in model.named_parameters() if '.gate.' in name)
    assert size - saved_bytes(model, lambda: model(maps()).square().mean()) >= (0.3 if name == 'SRM' else 0.5) * stacked
    loss = model(maps()).square().mean()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with Launches() as launches:
            loss.backward(retain_graph=True)
        if name == 'SE':
            assert launches.of['cat'] == 3  # once a group
        for key, parameter in model.named_parameters():
            grad = expected[f'gradient of {key}']
            assert (grad is None) == (parameter.grad is None)
            assert grad is None or torch.allclose(parameter.grad, grad, ATOL, ATOL)
    with torch.no_grad():
        model.layer1[0].bn2.gate[0].psi.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_second_derivatives_of_large_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regaining, 'KEPT', 0)
    test_second_derivatives()


def test_accumulated_gradients_and_two_forwards() -> None:
    x = maps()

    def accumulate(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        for part in x.split(1):
            (model(part).square().mean() + model(part * 2).mean()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    model = plugged()
    assert_same(accumulate(copy.deepcopy(model), x), by_site(model, x, accumulate))


def test_second_derivatives() -> None:
    def penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        gates = [p for name, p in model.named_parameters() if '.gate.' in name or 'bn2' in name]
        grads = torch.autograd.grad(model(x).square().mean(), gates, create_graph=True)
        sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]
        return {name: p.grad for name, p in model.named_parameters()}

    model = plugged()
    assert_same(penalty(copy.deepcopy(model), maps()), by_site(model, maps(), penalty), 1e-10)


@pytest.mark.parametrize('frozen', ['.gate.', 'bn2.weight', 'psi', 'layer2.'])
def test_frozen_parts(frozen: str) -> None:
    model = plugged()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    found = step(model, maps())
    assert all(found[f'gradient of {n}'] is None for n, p in model.named_parameters() if not p.requires_grad)
    assert_same(found, by_site(model, maps()))


@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(spec: Any, dtype: torch.dtype) -> None:
    model = plugged(spec, dtype=dtype).eval()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32):
        found = model(maps(dtype))
        expected = by_site(model, maps(dtype), lambda m, x: m(x))
        layer = gated(model)[0]
        ready = vars(model)[bank.BANK].ready(model)[layer].constants
        assert [c is None for c in ready] == [c is None for c in layer.constants()]
        for v, alone in zip(ready, layer.constants(), strict=True):
            assert v is None or v.dtype == dtype
            assert v is None or torch.allclose(v, alone.to(dtype), 1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(found, expected, 5e-2, 5e-2)


def test_gradients_wanted_inside_a_forward_without() -> None:
    """As classifier guidance wants them; and the other way round, a part without gradients inside a forward with."""
    model = plugged(ASR, Whole).eval()
    inner = model.layer2[0]
    psi = inner.bn2.gate[0].psi
    seen = []

    def watched(*_: Any) -> None:
        handle.remove()
        with torch.enable_grad():
            inner(torch.randn(2, 8, 16, 16, dtype=torch.float64)).sum().backward()
        seen.append(psi.grad.clone())

    handle = inner.register_forward_pre_hook(watched)
    with torch.no_grad():
        model(maps())
    assert seen[0].any()


def test_an_exception_leaves_nothing_open() -> None:
    model = plugged(ASR, Whole)

    def stumble() -> None:
        raise KeyError('on the way')

    handle = pause(model, stumble)
    with pytest.raises(KeyError):
        model(maps())
    handle.remove()
    assert vars(model)[bank.BANK].shelf.opened == []
    assert_same(step(model, maps()), by_site(model, maps()))


def test_a_model_that_calls_itself() -> None:
    model = plugged(ASR, Whole).eval()
    expected = model(maps() * 2)
    again: list[Tensor] = []

    def once_more() -> None:
        handle.remove()
        again.append(model(maps() * 2))

    handle = pause(model, once_more)
    y = model(maps())
    assert torch.equal(again[0], expected)
    assert torch.equal(y, model(maps()))


def test_copies_pickles_and_parts() -> None:
    model = plugged()
    expected = step(model, maps())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.load_state_dict(model.state_dict())
        assert vars(other)[bank.BANK] is not vars(model)[bank.BANK]
        assert {layer.shelf for layer in gated(other)} == {vars(other)[bank.BANK].shelf}
        swapped(other)  # the copy's gates are its own
        assert_same(step(other, maps()), by_site(other, maps()))
    assert_same(step(model, maps()), expected)
    stage = copy.deepcopy(model.layer1)
    assert stage(torch.randn(2, 8, 16, 16, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize('spec', [ASR, DIA], ids=['ASR', 'DIA'])
def test_a_model_goes_when_nobody_holds_it(spec: Any) -> None:
    """Its memory is free at once, and not when a collector of circles comes by."""
    gc.disable()
    try:
        model = plugged(spec)
        stock = weakref.ref(model.layer1[0].conv1)
        model(maps()).sum().backward()
        gate = weakref.ref(model.layer1[0].bn2.gate[0])
        del model
        assert stock() is None
        assert gate() is None or spec is DIA  # members of a run know each other
    finally:
        gc.enable()


def test_functional_call_and_transforms() -> None:
    model = plugged().eval()
    parameters = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(parameters, strict=False)
    expected = other(maps())
    assert torch.allclose(torch.func.functional_call(model, parameters, (maps(),)), expected, ATOL, ATOL)
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (maps(),)).square().mean())(parameters)
    plain = step(other, maps())
    assert torch.allclose(grads['layer1.0.bn2.gate.0.psi'], plain['gradient of layer1.0.bn2.gate.0.psi'], 1e-10, 1e-10)


def test_a_compiled_model_computes_by_site() -> None:
    model = plugged(dtype=torch.float32).eval()
    with torch.no_grad():
        y = torch.compile(model, backend='eager', fullgraph=True)(maps(torch.float32))
        assert torch.allclose(y, model(maps(torch.float32)), 1e-5, 1e-5)


def test_who_watches_a_gate_sees_it() -> None:
    model = plugged()
    seen: list[Tensor] = []
    handle = model.layer1[0].bn2.gate[0].register_forward_hook(lambda m, i, v: seen.append(v))
    model(maps())
    assert len(seen) == 1
    handle.remove()
    model(maps())
    assert len(seen) == 1


def test_weights_in_other_places_or_precisions() -> None:
    model = plugged()
    model(maps())
    model.layer1[0].bn2.gate[0].float()  # by hand: not like its neighbour
    assert served(model) == set(gated(model))
    assert [len(group.layers) for group in vars(model)[bank.BANK].plan] == [1, 1, 2, 2]
    assert_same(step(model, maps()), by_site(model, maps()), 1e-6)
    model.layer2[0].bn2.gate[0].attention.fc1.float()  # nothing that could be computed
    assert served(model) == {*gated(model.layer1), *gated(model.layer3)}
    model.double()
    abroad = copy.deepcopy(model).to('meta')
    assert served(abroad) == set()
    assert served(model.float()) == set(gated(model))


def test_parts_that_were_plugged_by_themselves_keep_their_bank() -> None:
    model = nn.Sequential(plugged(ASR, Whole), nn.Unflatten(1, (-1, 1, 1)), nn.Conv2d(32, 3, 1), nn.Conv2d(3, 3, 1))
    model.double()
    plug(model, {**ASR, 'sites': ['2', '3']})
    inner = model[0]
    assert served(inner) == set(gated(inner))
    assert served(model) == {model[2], model[3]}
    assert_same(step(model, maps()), by_site(model, maps()))


def test_layers_that_a_converter_rebuilt() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plugged())
    rebind(model)
    assert served(model) == set(gated(model))
    assert_same(step(model.eval(), maps()), by_site(model, maps()))


def test_a_folded_model_has_no_trace_of_it() -> None:
    model = plugged().eval()
    folded, _ = fold(model)
    assert not folded._forward_pre_hooks
    assert not folded._forward_hooks
    assert not folded._forward_hooks_always_called
    assert bank.BANK not in vars(folded)
    assert all('shelf' not in vars(m) for m in folded.modules())
    assert torch.allclose(folded(maps()), model(maps()), 1e-10, 1e-10)
    bank.uninstall(model)
    assert not model._forward_pre_hooks
    assert all('shelf' not in vars(m) for m in model.modules())
    assert torch.allclose(folded(maps()), model(maps()), 1e-10, 1e-10)


def test_data_parallel_training(tmp_path: Any) -> None:
    """Unused sites are None there too, and the gradients those of one process."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        for kind, unused in ((Whole, False), (Early, True)):
            model = plugged(ASR, kind)
            if not unused:
                model.fc.requires_grad_(False)
            expected = step(copy.deepcopy(model), maps())
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            for _ in range(2):
                model.load_state_dict(plugged(ASR, kind).state_dict())
                parallel.zero_grad(set_to_none=True)
                parallel(maps()).square().mean().backward()
            for name, parameter in model.named_parameters():
                grad = expected[f'gradient of {name}']
                assert (grad is None) == (parameter.grad is None), name
                assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name
    finally:
        torch.distributed.destroy_process_group()
