"""Models whose constant gates a bank computes, a training step of them, and the same without the bank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import plug
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.plugging.layers import Plugged
from helpers.cases import ATTENTIONS
from helpers.plugged import ASR

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


def swapped(model: nn.Module) -> None:
    """As MMEngine's EMA swaps weights."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + 0.1)


class Early(Whole):
    """Uses only some of its stages, and of the second only the first block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.bn1(self.conv1(x)).relu())
        return self.layer2[0](x).mean((2, 3))


class Late(Whole):
    """Leaves out the first block, from which a state would come."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1[1](self.bn1(self.conv1(x)).relu())).mean((2, 3))
