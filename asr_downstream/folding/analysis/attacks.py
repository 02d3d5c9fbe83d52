"""Attacks: images that are changed within a bound so that the loss of a model grows as much as it can.

FGSM takes one step along the sign of the gradient (Goodfellow et al., arXiv 1412.6572). PGD starts at random within the
bound and takes several smaller ones (Madry et al., arXiv 1706.06083). The bound is on every value of the image, as a
part of the range from black to white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ['ATTACKS', 'Attack', 'Loss', 'fgsm', 'pgd']

STEPS = 10  # of PGD, each a quarter of the bound

# Loss of images ``(B, C, H, W)``, a scalar: the sum over them, so that one image does not weaken the step of another.
Loss: TypeAlias = Callable[[Tensor], Tensor]
# ``(loss, images, black, white) -> changed images``
Attack: TypeAlias = Callable[[Loss, Tensor, Any, Any], Tensor]


def fgsm(strength: float, seed: int = 0) -> Attack:
    """Make an attack of one step; ``seed`` is not used."""

    def attack(loss: Loss, images: Tensor, black: Any, white: Any) -> Tensor:
        size = strength * (white - black)
        return within(images + size * gradient(loss, images).sign(), images, size, black, white)

    return attack


def pgd(strength: float, seed: int = 0) -> Attack:
    """Make an attack of `STEPS` steps from a random start, drawn in the order of the images."""
    stream = torch.Generator().manual_seed(seed)

    def attack(loss: Loss, images: Tensor, black: Any, white: Any) -> Tensor:
        size = strength * (white - black)
        start = 2 * torch.rand(images.shape, generator=stream).to(images) - 1
        found = within(images + size * start, images, size, black, white)
        for _ in range(STEPS):
            found = within(found + size / 4 * gradient(loss, found).sign(), images, size, black, white)
        return found

    return attack


def gradient(loss: Loss, images: Tensor) -> Tensor:
    """Gradient of a loss by images; parameters get none."""
    with torch.enable_grad():
        given = images.detach().clone().requires_grad_(True)
        (found,) = torch.autograd.grad(loss(given), given)
    return found


def within(found: Tensor, images: Tensor, size: Any, black: Any, white: Any) -> Tensor:
    """Bring changed images back to within ``size`` of the images, and between black and white."""
    size, black, white = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (size, black, white))
    return torch.clamp(torch.clamp(found, images - size, images + size), black, white).detach()


ATTACKS: dict[str, Callable[[float, int], Attack]] = {'fgsm': fgsm, 'pgd': pgd}
