"""Which backbones of MMDetection can be plugged, found out by doing it: the table of the documentation.

Each backbone is built small, with random weights and statistics, in float64, and checked: its sites are found; stock
weights load with only the gates missing; one training step moves the gates of every site; the folded model equals the
plugged one and loads strictly into the stock class; gates that depend on the input (SE, DIA) train, and do not fold.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from asr_downstream.errors import AsrError, FoldError, PlugError
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.verify import verify
from asr_downstream.modules.slots import SHARED
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.plug import Spec
from asr_downstream.plugging.sites import branch_of, parents_of

__all__ = ['BACKBONES', 'Backbone', 'Row', 'build', 'check', 'markdown']

ASR = {'type': 'ASR', 'attention': {'type': 'SE', 'reduction': 4}}
SE = {'type': 'Attention', 'attention': {'type': 'SE', 'reduction': 4}}
DIA = {'type': 'DIA', 'attention': {'type': 'DIALSTM', 'reduction': 4}}
BAR = 1e-10


@dataclass(frozen=True)
class Backbone:
    """A backbone of MMDetection at a small size.

    Attributes:
        name: row of the table.
        config: of the stock model.
        sites: spec of the sites; patterns where a backbone has no residual branch.
        side: of the input image, in pixels.
    """

    name: str
    config: dict[str, Any]
    sites: str | list[str] = 'residual'
    side: int = 64


def resnets() -> Iterator[Backbone]:
    """ResNets and their relatives, an eighth of the width."""
    small = {'base_channels': 8}
    for depth in (18, 34, 50, 101, 152):
        yield Backbone(f'ResNet-{depth}', {'type': 'ResNet', 'depth': depth, **small})
    yield Backbone('ResNet-50 V1c', {'type': 'ResNet', 'depth': 50, 'deep_stem': True, **small})
    yield Backbone('ResNet-50 V1d', {'type': 'ResNetV1d', 'depth': 50, **small})
    yield Backbone('ResNet-18, GroupNorm', {'type': 'ResNet', 'depth': 18, 'norm_cfg': GROUPS, **small})
    yield Backbone('ResNeXt-50', {'type': 'ResNeXt', 'depth': 50, 'groups': 4, 'base_width': 4, **small})
    yield Backbone('Res2Net-50', {'type': 'Res2Net', 'depth': 50, 'scales': 4, 'base_width': 26, **small})
    yield Backbone('ResNeSt-50', {'type': 'ResNeSt', 'depth': 50, 'reduction_factor': 4, **small})
    yield Backbone('DetectoRS ResNet-50', {'type': 'DetectoRS_ResNet', 'depth': 50, **DETECTORS, **small})
    yield Backbone('TridentNet ResNet-50', {'type': 'TridentResNet', 'depth': 50, **TRIDENT, **small})


GROUPS = {'type': 'GN', 'num_groups': 4}
DETECTORS = {'stage_with_sac': (False,) * 4, 'output_img': False}
TRIDENT = {'num_branch': 3, 'test_branch_idx': 1, 'strides': (1, 2, 2), 'dilations': (1, 1, 1), 'num_stages': 3,
           'trident_dilations': (1, 2, 3), 'out_indices': (2,)}  # fmt: skip
REGNET = {'w0': 8, 'wa': 8.0, 'wm': 2.0, 'group_w': 4, 'depth': 8, 'bot_mul': 1.0}
HRNET = {
    'stage1': {'num_modules': 1, 'num_branches': 1, 'block': 'BOTTLENECK', 'num_blocks': (2,), 'num_channels': (8,)},
    'stage2': {'num_modules': 1, 'num_branches': 2, 'block': 'BASIC', 'num_blocks': (2,) * 2, 'num_channels': (8, 16)},
    'stage3': {
        'num_modules': 1, 'num_branches': 3, 'block': 'BASIC', 'num_blocks': (2,) * 3, 'num_channels': (8, 16, 32),
    },
    'stage4': {
        'num_modules': 1, 'num_branches': 4, 'block': 'BASIC', 'num_blocks': (2,) * 4, 'num_channels': (8, 16, 32, 64),
    },
}  # fmt: skip
SWIN = {'embed_dims': 16, 'depths': (2, 2, 2, 2), 'num_heads': (1, 2, 4, 8), 'window_size': 4, 'drop_path_rate': 0.0}
PVT = {'embed_dims': 8, 'num_layers': (2, 2, 2, 2), 'num_heads': (1, 2, 4, 8), 'drop_path_rate': 0.0}
HOURGLASS = {'downsample_times': 3, 'num_stacks': 2, 'stage_channels': (16, 16, 24, 32), 'stage_blocks': (2, 2, 2, 2),
             'feat_channel': 16}  # fmt: skip

BACKBONES: tuple[Backbone, ...] = (
    *resnets(),
    Backbone('RegNet', {'type': 'RegNet', 'arch': REGNET}),
    Backbone('HRNet', {'type': 'HRNet', 'extra': HRNET}),
    Backbone('MobileNetV2', {'type': 'MobileNetV2', 'widen_factor': 0.25}),
    Backbone('EfficientNet-B0', {'type': 'EfficientNet', 'arch': 'b0', 'drop_path_rate': 0.0}),
    Backbone('EfficientNet-ES', {'type': 'EfficientNet', 'arch': 'es', 'drop_path_rate': 0.0}),
    Backbone('CSPDarknet (YOLOX)', {'type': 'CSPDarknet', 'deepen_factor': 0.33, 'widen_factor': 0.125}),
    Backbone(
        'CSPDarknet, depthwise',
        {'type': 'CSPDarknet', 'deepen_factor': 0.33, 'widen_factor': 0.125, 'use_depthwise': True},
    ),
    Backbone('CSPNeXt (RTMDet)', {'type': 'CSPNeXt', 'deepen_factor': 0.33, 'widen_factor': 0.125}),
    Backbone('Darknet-53', {'type': 'Darknet', 'depth': 53}),
    Backbone('Swin', {'type': 'SwinTransformer', **SWIN}),
    Backbone('PVT', {'type': 'PyramidVisionTransformer', **PVT}),
    Backbone('PVTv2', {'type': 'PyramidVisionTransformerV2', **PVT}),
    Backbone('Hourglass', {'type': 'HourglassNet', **HOURGLASS}, side=128),
    Backbone('VGG (SSD)', {'type': 'SSDVGG', 'depth': 16, 'out_feature_indices': (22, 34)}),
    Backbone('VGG (SSD), named', {'type': 'SSDVGG', 'depth': 16, 'out_feature_indices': (22, 34)}, ['features.1[0-9]']),
)


@dataclass
class Row:
    """What was found of a backbone.

    Attributes:
        name: of the backbone.
        sites: their paths, with ``*`` for numbers.
        count: how many there are at the size that was built.
        block: class of the block of the first site.
        difference: largest relative difference of folded and plugged outputs, float64.
        control: the same of folded and plain outputs, which must not be small.
        dynamic: which of SE and DIA train.
        reason: why it cannot be plugged; '' if it can.
    """

    name: str
    sites: list[str] = field(default_factory=list)
    count: int = 0
    block: str = ''
    difference: float = float('nan')
    control: float = float('nan')
    dynamic: list[str] = field(default_factory=list)
    reason: str = ''


def build(backbone: Backbone, spec: Spec | None = None) -> nn.Module:
    """Build a backbone, stock or plugged, all of it trained, in float64."""
    init_default_scope('mmdet')
    config = copy.deepcopy(backbone.config)
    if spec is not None:
        config.update(type=f'asr_downstream.{config["type"]}', plug={**spec, 'sites': backbone.sites})  # type: ignore
    model = MODELS.build(config)
    model.norm_eval = False  # ResNet and its relatives keep pretrained statistics in training: here there are none
    return model.double()


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw parameters and statistics anew: defaults (beta = 0, mean = 0, var = 1) hide mistakes."""
    for p in model.parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p[0].numel()) ** 0.5)
        else:
            p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.2)
    for name, b in model.named_buffers():
        if name.endswith('running_mean'):
            b.copy_(torch.randn(b.shape, generator=generator, dtype=b.dtype) * 0.3)
        elif name.endswith('running_var'):
            b.copy_(torch.rand(b.shape, generator=generator, dtype=b.dtype) + 0.5)


def check(backbone: Backbone) -> Row:
    """Find out what can be done with a backbone.

    Raises:
        AsrError: something that is promised of a backbone with sites does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    stock = build(backbone)
    randomise(stock, generator)
    stock.eval()
    x = torch.randn(2, 3, backbone.side, backbone.side, generator=generator, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            model = build(backbone, ASR)
        except PlugError as error:
            return Row(backbone.name, reason=str(error))
        missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
        require(not unexpected and all('.gate.' in key for key in missing), backbone, 'stock weights do not load')
        train_step(model, x, backbone)
        model.eval()
        folded, _ = fold_exactly(model)
        require(type(folded) is type(stock), backbone, 'folding does not give the stock class')
        plain = copy.deepcopy(stock)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.gate.' not in k}, strict=True)
        stock.load_state_dict(folded.state_dict(), strict=True)
        row = Row(backbone.name, difference=verify(model, stock, x).relative, control=verify(stock, plain, x).relative)
        require(row.difference < BAR, backbone, f'folded differs by {row.difference:.1e}')
        require(row.control > 1e-6, backbone, 'the gates change nothing, so the comparison says nothing')
        paths = [site.path for site in describe(model).sites]
        row.sites = patterns(paths)
        row.count = len(paths)
        row.block = type(block_around(model, paths[0])).__name__
        for name, spec in (('SE', SE), ('DIA', DIA)):
            dynamic = build(backbone, spec)
            dynamic.load_state_dict(plain.state_dict(), strict=False)
            train_step(dynamic, x, backbone)
            dynamic.eval()
            try:
                fold_exactly(dynamic)
            except FoldError:
                row.dynamic.append(name)
            else:
                raise AsrError(f'{backbone.name}: {name} depends on the input, but was folded')
    return row


def require(held: bool, backbone: Backbone, what: str) -> None:
    """Raise if something promised does not hold."""
    if not held:
        raise AsrError(f'{backbone.name}: {what}')


def train_step(model: nn.Module, x: Tensor, backbone: Backbone) -> None:
    """One step of SGD; the gates of every site must move."""
    model.train()
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, Plugged)}
    own = {path: [p for slot in (m.gate, m.dynamic) if slot for p in slot.parameters()] for path, m in layers.items()}
    shared = list(getattr(model, SHARED, nn.ModuleDict()).parameters())
    before = {id(p): p.detach().clone() for p in [*shared, *(p for of_site in own.values() for p in of_site)]}
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    outputs = model(x)
    weights = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=weights, dtype=y.dtype)).mean() for y in tensors(outputs))
    loss.backward()  # type: ignore[union-attr]
    optimiser.step()
    for path, parameters in {**own, SHARED: shared}.items():
        moved = not parameters or any(not torch.equal(p, before[id(p)]) for p in parameters)
        require(moved, backbone, f'the gates at {path} do not train')


def tensors(outputs: Any) -> list[Tensor]:
    """Tensors of a backbone's output."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for o in outputs for t in tensors(o)]


def patterns(paths: list[str]) -> list[str]:
    """Short forms of paths: those that differ in numbers alone become one, with ``*`` where they differ."""
    alike: dict[str, list[list[str]]] = {}
    for path in paths:
        alike.setdefault(re.sub(r'\d+', '', path), []).append(path.split('.'))
    found = []
    for group in alike.values():
        parts = (sorted(set(column)) for column in zip(*group, strict=True))
        found.append('.'.join(part[0] if len(part) == 1 else f'{os.path.commonprefix(part)}*' for part in parts))
    return found


def block_around(model: nn.Module, path: str) -> nn.Module:
    """Nearest known block around a site, or its parent."""
    parents = [model.get_submodule(parent) for parent in parents_of(path)]
    return next((m for m in reversed(parents) if branch_of(m) is not None), parents[-1])


def markdown(rows: list[Row]) -> str:
    """The table of the documentation: only what does not depend on the machine."""
    lines = ['| backbone | block | sites | ASR folds exactly | SE, DIA |', '|---|---|---|---|---|']
    for row in rows:
        if row.reason:
            lines.append(f'| {row.name} | | none: {row.reason.split(". ")[0].split(" (known")[0]} | | |')
        else:
            sites = ', '.join(f'`{s}`' for s in row.sites[:2]) + (', ...' if len(row.sites) > 2 else '')
            lines.append(f'| {row.name} | `{row.block}` | {sites} | yes | {", ".join(row.dynamic)} |')
    return '\n'.join(lines)
