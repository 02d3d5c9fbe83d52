"""Attentions: parameter counts, shapes, first gates, behaviour on a learned input."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import ATTENTION_COUNTS, ATTENTIONS, FRESH_GATES
from torch import nn

from asr_downstream import PlugError, plug
from asr_downstream.attention import CBAM, ECA, SE, SPA, SRM
from asr_downstream.models import resnet164
from asr_downstream.registry import ATTENTIONS as REGISTRY
from asr_downstream.registry import build


def test_resnet164_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in resnet164().parameters()) == 1_727_284


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_parameter_counts_match_the_papers_table(attention: str) -> None:
    model = resnet164()
    sites = plug(model, dict(type='Attention', attention=dict(type=attention)))
    assert len(sites.sites) == 54
    assert sum(p.numel() for p in model.parameters()) == ATTENTION_COUNTS[attention]


def test_asr_se_has_the_parameters_of_the_official_code_without_its_dead_copies() -> None:
    model = resnet164()
    plug(model, dict(type='ASR', attention=dict(type='SE')))
    psi = 18 * (64 + 128 + 256)
    assert sum(p.numel() for p in model.parameters()) == ATTENTION_COUNTS['SE'] + psi


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('shape', [(3, 16, 6, 5), (3, 16, 1, 1)], ids=['map', 'one position'])
def test_gates_of_a_map(attention: str, shape: tuple[int, ...]) -> None:
    module = build(REGISTRY, dict(type=attention), channels=16)
    gates = module(torch.randn(shape))
    assert gates.shape[:2] == (3, 16)
    assert gates.isfinite().all()
    assert (gates > 0).all()
    assert (gates < 1).all()


@pytest.mark.parametrize('attention', [a for a in ATTENTIONS if a != 'CBAM'])
@pytest.mark.parametrize('shape', [(3, 16), (3, 16, 9), (3, 16, 2, 4, 3)], ids=['vector', '1d', '3d'])
def test_gates_of_other_inputs(attention: str, shape: tuple[int, ...]) -> None:
    module = build(REGISTRY, dict(type=attention), channels=16)
    assert module(torch.randn(shape)).shape == (3, 16)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_fresh_gates_on_a_learned_input(attention: str) -> None:
    layer = nn.BatchNorm2d(64)
    plug(nn.Sequential(layer), dict(type='ASR', attention=dict(type=attention), sites=['0']))
    low, high = FRESH_GATES[attention]
    v = layer.constant()
    assert v.shape == (64,)
    assert (v >= low - 1e-6).all()
    assert (v <= high + 1e-6).all()


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_training_on_a_learned_input_moves_every_parameter_that_can_move(attention: str) -> None:
    """Three SGD steps. Wide enough that no bottleneck starts with all its ReLUs shut: they would stay so."""
    layer = nn.BatchNorm2d(128)
    model = nn.Sequential(layer)
    plug(model, dict(type='ASR', attention=dict(type=attention), sites=['0']))
    nn.init.uniform_(layer.bias)
    before = {n: p.clone() for n, p in layer.gate.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        (model(torch.randn(4, 128, 5, 5)) - 1).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # DDP waits for every one
        optimiser.step()
    still = {n for n, p in layer.gate.named_parameters() if torch.equal(p, before[n])}
    assert still == set()


def test_srm_on_one_position_has_no_style() -> None:
    module = SRM(4)
    nn.init.normal_(module.cfc)
    module.eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), module(x[:, :, None, None]))


def test_cbam_on_a_vector_is_twice_its_mlp() -> None:
    module = CBAM(32, spatial=False)
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x), (2 * module.mlp(x)).sigmoid())


def test_spa_on_one_position_sees_twenty_one_copies() -> None:
    module = SPA(32)
    x = torch.randn(3, 32)
    repeated = torch.cat([x[:, :, None].expand(-1, -1, n * n).flatten(1) for n in (1, 2, 4)], 1)
    torch.testing.assert_close(module(x), module.fc2(module.fc1(repeated).relu()).sigmoid())


def test_eca_gives_inner_channels_of_a_constant_one_gate() -> None:
    gates = ECA(12)(torch.full((1, 12), 0.1))[0]
    assert torch.unique(gates[1:-1]).numel() == 1


@pytest.mark.parametrize(('channels', 'kernel'), [(64, 3), (256, 5), (2048, 7)])
def test_eca_adaptive_kernel(channels: int, kernel: int) -> None:
    k = abs(torch.tensor(float(channels)).log2() / 2 + 0.5)
    size = ECA(channels, kernel_size='adaptive').conv.kernel_size[0]
    assert size % 2 == 1
    assert abs(size - k) <= 1.01
    assert size in (kernel, kernel - 2, kernel + 2)


@pytest.mark.parametrize('attention', [SE, SPA, CBAM])
def test_a_bottleneck_is_never_empty(attention: type[nn.Module]) -> None:
    module = attention(4)  # 4 // 16 would be 0
    assert all(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    'spec', [dict(type='ECA', kernel_size=4), dict(type='SRM', norm='layer'), dict(type='SE', r=2)], ids=str
)
def test_wrong_arguments_are_named(spec: dict) -> None:
    with pytest.raises(PlugError, match=spec['type']):
        build(REGISTRY, spec, channels=8)
