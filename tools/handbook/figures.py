"""The figures of the picture in the README: one detector and one UNet, each stock, plugged and folded, counted.

Counts and not times, so that they are the same on every machine; the difference of the outputs is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream import describe, fold
from asr_downstream.measure.cost import gmacs, parameters
from asr_downstream.measure.launches import Launches

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = 'det_configs/retinanet/retinanet_r50{}_fpn_1x_coco.py'
UNET = 'diffusion/configs/unet-w32{}_cifar10.py'
Forward = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Form:
    """What one of the three forms of a model has and costs.

    Attributes:
        module: class of the model.
        parameters: their number.
        keys: number of entries of the state dict.
        gmacs: multiply-adds of a forward, in units of 1e9.
        operators: operators that a forward dispatches, views left out, see `asr_downstream.measure.launches`.
        loads: whether its weights load into the stock class with ``strict=True``.
        difference: largest absolute difference of the outputs from those of the plugged form, float32. The stock form
            has the same weights, so there it is what the gates change.
    """

    module: str
    parameters: int
    keys: int
    gmacs: float
    operators: int
    loads: bool
    difference: float


@dataclass(frozen=True)
class Figures:
    """The three forms of a model.

    Attributes:
        title: what the model is.
        input: what it was run on.
        sites: number of sites that are plugged.
        site: what comes before a site, the site, and the site when the gates are folded into it.
        forms: ``'stock'``, ``'plugged'`` and ``'folded'``.
    """

    title: str
    input: str
    sites: int
    site: tuple[str, str, str]
    forms: dict[str, Form]


def measure(
    title: str, size: str, site: tuple[str, str, str], stock: nn.Module, plugged: nn.Module, forward: Forward
) -> Figures:
    """Draw the gates at random, fold, and count the three forms."""
    random = torch.Generator().manual_seed(0)
    own = stock.state_dict().keys()
    with torch.no_grad():
        for name, value in plugged.named_parameters():
            if name not in own and 'gate' in name:
                value.add_(torch.randn(value.shape, generator=random), alpha=0.5)
    plugged.eval()
    folded, _ = fold(plugged)
    models = {'stock': stock.eval(), 'plugged': plugged, 'folded': folded}
    with torch.no_grad():
        expected = outputs(forward(plugged))
    forms = {}
    for name, model in models.items():
        with torch.no_grad(), Launches() as launches:
            found = outputs(forward(model))
        apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        forms[name] = Form(
            type(model).__name__,
            parameters(model),
            len(model.state_dict()),
            gmacs(partial(forward, model)),
            launches.number,
            loads(stock, model),
            apart,
        )
    return Figures(title, size, len(describe(plugged).sites), site, forms)


def outputs(found: Any) -> list[Tensor]:
    """The tensors of what a model returns."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in outputs(part)]


def loads(stock: nn.Module, model: nn.Module) -> bool:
    """Whether the weights of a model are those of the stock class, key by key and shape by shape."""
    weights = {name: value.shape for name, value in model.state_dict().items()}
    return weights == {name: value.shape for name, value in stock.state_dict().items()}


def detector() -> Figures:
    """RetinaNet R50 with ASR(SE) at the branches of stages 2 to 4."""
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.models.detectors import build_detector

    images = torch.randn(1, 3, 256, 320, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    stock, plugged = (
        build_detector(load_config(ROOT / DETECTOR.format(plug), needs_data=False)) for plug in ('', '-asr-se-c3-c5')
    )
    plugged.load_state_dict(stock.state_dict(), strict=False)
    site = ('convolution', 'norm  γ, β', 'norm  vγ, vβ')
    return measure(
        'Detector: RetinaNet R50', '320 x 256 pixels', site, stock, plugged, lambda m: m(images, mode='tensor')
    )


def unet() -> Figures:
    """The UNet of the CIFAR-10 configs with ASR(SE)."""
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model

    noisy = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    stock, plugged = (build_model(load_config(ROOT / UNET.format(plug), {}, None)) for plug in ('', '-asr-se'))
    plugged.load_state_dict(stock.state_dict(), strict=False)
    site = ('norm, SiLU', 'conv  W, b', 'conv  vW, vb')
    return measure(
        'UNet for CIFAR-10', '32 x 32 pixels', site, stock, plugged, lambda m: m(noisy, 500, return_dict=False)
    )
