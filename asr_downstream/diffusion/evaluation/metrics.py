"""FID and KID: features of an extractor, distances of torchmetrics. `METRICS` has them by name, and those of users.

A metric is called with ``real`` and ``generated``, features ``(N, F)`` in float64 on the CPU, and a seed. It returns
numbers by their names. In a launch of several processes the first one calls it alone: it must not wait for others, as
torchmetrics does without ``sync_on_compute=False``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from asr_downstream.console.progress import bar
from asr_downstream.diffusion.evaluation.encoder import load_encoder
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.atomic import sha256
from asr_downstream.registry import Registry, find

__all__ = ['METRICS', 'Distances', 'Extractor', 'Inception', 'build_extractor', 'check_metrics', 'features_of']

METRICS = Registry('metric', error=AsrError)
KID_SUBSETS = 100
HERE: dict[str, Any] = {'sync_on_compute': False}  # of torchmetrics: the first process of a launch has all features


class Extractor(Protocol):
    """Maps images ``(B, C, H, W)`` in [0, 1] to features ``(B, num_features)``."""

    num_features: int
    identity: str

    def __call__(self, images: Tensor) -> Tensor: ...


class Inception(nn.Module):
    """The Inception-v3 of the literature, 2,048 features, as torch-fidelity ports it.

    Args:
        weights: path of ``pt_inception-2015-12-05-6726825d.pth``; None: torch-fidelity downloads it.

    Raises:
        AsrError: torch-fidelity is not installed, or the weights cannot be read or downloaded.
    """

    num_features = 2048

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        if weights is not None and not weights.is_file():
            raise AsrError(f'{weights}: no such file; give the Inception weights as --extractor inception:PATH')
        try:
            metric = FrechetInceptionDistance(
                2048, feature_extractor_weights_path=None if weights is None else str(weights)
            )
        except ModuleNotFoundError as error:
            raise AsrError(
                'Inception needs torch-fidelity and torchvision; install both for your torch (pip install '
                'torch-fidelity), or use --extractor encoder, which needs nothing'
            ) from error
        except Exception as error:  # no connection, or a file that is not these weights
            raise AsrError(
                f'the Inception weights cannot be had ({type(error).__name__}: {error}); download '
                f'pt_inception-2015-12-05-6726825d.pth and give it as --extractor inception:PATH'
            ) from error
        self.net = metric.inception
        self.identity = 'inception-v3-compat 2048' + (f' sha256:{sha256(weights)[:16]}' if weights else '')

    def forward(self, images: Tensor) -> Tensor:
        """Features; grey is repeated to three channels."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.net((images[:, :3] * 255).round().byte())


def build_extractor(name: str, encoder: Path | None = None) -> Any:
    """Build ``'inception'``, ``'inception:PATH'``, or an encoder from its file."""
    if name.partition(':')[0] == 'inception':
        path = name.partition(':')[2]
        return Inception(Path(path) if path else None)
    return load_encoder(encoder or Path(name))


@torch.no_grad()
def features_of(extractor: Any, batches: Iterable[Tensor], text: str = '') -> Tensor:
    """Features ``(N, num_features)`` of batches of images in [0, 1], on the CPU."""
    device = next(extractor.parameters()).device
    found = [extractor(images.to(device)).float().cpu() for images in (bar(batches, text) if text else batches)]
    return torch.cat(found)


class Given(nn.Module):
    """Stands in for the network of torchmetrics: the features are computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return them."""
        return features


def check_metrics(names: Iterable[str]) -> None:
    """Refuse names of metrics that are not known, or none at all.

    Raises:
        AsrError: see above.
    """
    names = list(names)
    if not names:
        raise AsrError(f'metrics: none are named; use {", ".join(METRICS.module_dict)}')
    for name in names:
        find(METRICS, name)


@METRICS.register_module(name='fid')
def fid(real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    """Frechet distance of normal distributions that are fitted to the features."""
    metric = FrechetInceptionDistance(feature=Given(real.shape[1]), **HERE)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return {'fid': float(metric.compute())}


@METRICS.register_module(name='kid')
def kid(real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    """Maximum mean discrepancy with a cubic kernel, mean and standard deviation over subsets."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter('ignore')  # that it keeps all features
        torch.manual_seed(seed)
        size = subset_size(len(generated), len(real))
        metric = KernelInceptionDistance(feature=Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size, **HERE)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, std = metric.compute()
    return {'kid': float(mean), 'kid_std': float(std)}


class Distances:
    """Distances to a set of real images.

    Args:
        real: features ``(N, F)`` of the real images.
        metrics: names in `METRICS`.
        seed: of KID's subsets.

    Raises:
        AsrError: a metric is not known.
    """

    def __init__(self, real: Tensor, metrics: Iterable[str], seed: int = 0) -> None:
        self.metrics = list(metrics)
        check_metrics(self.metrics)
        self.real = real.double()
        self.seed = seed

    def to(self, generated: Tensor) -> dict[str, float]:
        """Distances ``{'fid': ..., 'kid': ..., 'kid_std': ...}`` of generated images, by their features.

        Raises:
            DataError: too few images for a metric.
        """
        count = len(generated)
        if min(count, len(self.real)) < 2:
            raise DataError(f'{count} generated and {len(self.real)} real images are too few; use --num-samples')
        numbers: dict[str, float] = {}
        for name in self.metrics:
            found = find(METRICS, name)(self.real, generated.double(), self.seed)
            numbers |= {
                key: float(value) for key, value in (found if isinstance(found, dict) else {name: found}).items()
            }
        return numbers


def subset_size(generated: int, real: int) -> int:
    """Size of KID's subsets: 1,000, or half of what there is."""
    return max(2, min(1000, generated // 2, real // 2))
