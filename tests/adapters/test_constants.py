"""Adapters in layers of every kind, in float64: both sides, shifts, strength, and the order of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from helpers.adapters import differing, same
from helpers.cases import LAYER_CASES, LayerCase
from torch import Tensor, nn

from asr_downstream import CheckpointError, apply_gates
from asr_downstream.folding.adapters.apply import apply_to_state, given
from asr_downstream.folding.adapters.base import Frozen, digests
from asr_downstream.folding.adapters.file import Adapter, Site, read_adapter, write_adapter
from asr_downstream.folding.adapters.layers import KINDS, kind_of
from asr_downstream.modules.affine import Constants, input_channels, output_channels

BAR = 1e-10
IDS = [case.name for case in LAYER_CASES]
cases = pytest.mark.parametrize('case', LAYER_CASES, ids=IDS)


def drawn(layer: nn.Module, signs: bool = False) -> Constants:
    """Constants of all kinds that a layer can have."""

    def scales(count: int) -> Tensor:
        v = torch.rand(count, dtype=torch.float64) + 0.3
        return v * torch.where(torch.rand(count) < 0.3, -1, 1) if signs else v

    shift = None if layer.bias is None else torch.randn(output_channels(layer), dtype=torch.float64)
    inputs = None if normalises(layer) else scales(input_channels(layer))
    return Constants(scales(output_channels(layer)), shift, inputs)


def normalises(layer: nn.Module) -> bool:
    return layer.weight.dim() == 1


def adapter_of(model: nn.Module, constants: Constants) -> Adapter:
    kind = kind_of(model[0])
    assert kind is not None
    site = Site(kind, getattr(model[0], 'groups', 1), constants)
    return Adapter({'0': site}, Frozen.of(digests(model.state_dict())))


def along(v: Tensor, y: Tensor, dim: int) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = -1
    return v.view(shape)


def computed(layer: nn.Module, several: list[Constants], x: Tensor, dim: int) -> Tensor:
    """What adapters do, one after another, said with hooks instead of weights: ``(y v1 + s1) v2 + s2`` of scaled x."""
    for _, _, u in several:
        x = x if u is None else x * along(u, x, dim)
    y = layer(x)
    for v, s, _ in several:
        y = y if v is None else y * along(v, y, dim)
        y = y if s is None else y + along(s, y, dim)
    return y


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@cases
def test_constants_of_both_sides_with_and_without_a_model(case: LayerCase, tmp_path: Path) -> None:
    model = randomise(nn.Sequential(case.build().double())).eval()
    adapter = adapter_of(model, drawn(model[0], signs=True))
    write_adapter(adapter, tmp_path / 'a.safetensors')
    read = read_adapter(tmp_path / 'a.safetensors')
    applied, x = apply_gates(model, tmp_path / 'a.safetensors'), case.input()
    wanted = computed(model[0], [adapter.sites['0'].constants], x, case.channel_dim)
    assert apart(applied(x), wanted) < BAR
    assert apart(model(x), wanted) > 1e-3
    for kind in ('gate', 'shift', 'inputs'):  # negative control: each of them counts
        left = replace(read.sites['0'], constants=read.sites['0'].constants._replace(**{kind: None}))
        if left.constants != read.sites['0'].constants and getattr(read.sites['0'].constants, kind) is not None:
            assert apart(apply_gates(model, replace(read, sites={'0': left}))(x), wanted) > 1e-3, kind
    state = apply_to_state(model.state_dict(), given(read))
    assert all(same(value, applied.state_dict()[name]) for name, value in state.items())


@cases
@pytest.mark.parametrize('strength', [0.0, 0.4, 1.0, 1.7])
def test_strength(case: LayerCase, strength: float) -> None:
    model, x = randomise(nn.Sequential(case.build().double())).eval(), case.input()
    v, s, u = drawn(model[0], signs=True)

    def part(scales: Tensor | None) -> Tensor | None:
        if scales is None:
            return None
        return torch.tensor(
            [a**strength if a > 0 else 1 + strength * (a - 1) for a in scales.tolist()], dtype=torch.float64
        )

    wanted = computed(model[0], [Constants(part(v), None if s is None else s * strength, part(u))], x, case.channel_dim)
    adapter = adapter_of(model, Constants(v, s, u))
    assert apart(apply_gates(model, adapter, strength)(x), wanted) < BAR
    assert apart(apply_gates(model, adapter, strength + 0.2)(x), wanted) > 1e-3


@cases
def test_several_in_their_order(case: LayerCase) -> None:
    model, x = randomise(nn.Sequential(case.build().double())).eval(), case.input()
    first, then = drawn(model[0]), drawn(model[0])
    a, b = (adapter_of(model, each) for each in (first, then))
    wanted = computed(model[0], [first, then], x, case.channel_dim)
    assert apart(apply_gates(model, [a, b])(x), wanted) < BAR
    assert apart(apply_gates(model, a)(x), wanted) > 1e-3
    other = apply_gates(model, [b, a])(x)
    if first.shift is None:  # scales commute
        assert apart(other, wanted) < BAR
    else:
        assert apart(other, computed(model[0], [then, first], x, case.channel_dim)) < BAR
        assert apart(other, wanted) > 1e-3, 'shifts do not'


@cases
def test_two_halves_of_scales_are_the_whole(case: LayerCase) -> None:
    model, x = randomise(nn.Sequential(case.build().double())).eval(), case.input()
    adapter = adapter_of(model, drawn(model[0])._replace(shift=None))
    whole = apply_gates(model, adapter)(x)
    assert apart(apply_gates(model, [adapter, adapter], [0.5, 0.5])(x), whole) < BAR
    assert apart(apply_gates(model, [adapter, adapter], [0.5, 0.4])(x), whole) > 1e-3
    inverse = apply_gates(model, [adapter, adapter], [1.0, -1.0])
    assert apart(inverse(x), model(x)) < BAR


def test_every_kind_of_layer_is_tried() -> None:
    assert {kind_of(case.build()) for case in LAYER_CASES} == set(KINDS)
    assert kind_of(nn.ReLU()) is None
    assert kind_of(nn.Embedding(2, 2)) is None


def test_a_shift_needs_a_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False)).double()
    adapter = adapter_of(model, Constants(shift=torch.ones(2, dtype=torch.float64)))
    for function in (apply_gates, lambda m, a: apply_to_state(m.state_dict(), given(a))):
        with pytest.raises(CheckpointError, match='0: the adapter does not fit it .Conv2d has no bias'):
            function(model, adapter)


def test_weights_that_would_not_be_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).half()
    adapter = adapter_of(model, Constants(gate=torch.full((2,), 1e6, dtype=torch.float64)))
    with pytest.raises(CheckpointError, match=r'0.weight: would not be finite in torch.float16; take less strength'):
        apply_gates(model, adapter)
    assert differing(apply_gates(model, adapter, 0), model) == []


@pytest.mark.parametrize(
    ('kind', 'groups', 'shape'),
    [('Conv2d', 1, (4, 4)), ('Linear', 1, (4,)), ('BatchNorm2d', 1, (4, 4)), ('ConvTranspose2d', 3, (4, 4, 1, 1))],
)
def test_weights_of_another_kind_of_layer_are_refused(kind: str, groups: int, shape: tuple[int, ...]) -> None:
    state = {'0.weight': torch.randn(shape), '0.bias': torch.randn(4)}
    site = Site(kind, groups, Constants(gate=torch.ones(4, dtype=torch.float64)))
    adapter = Adapter({'0': site}, Frozen.of(digests(state)))
    with pytest.raises(CheckpointError, match='not the weight of a|has a weight of shape'):
        apply_to_state(state, given(adapter))
    with pytest.raises(CheckpointError, match='is torch.int64 of shape'):
        apply_to_state({'0.weight': torch.ones(shape, dtype=torch.long)}, given(adapter))
