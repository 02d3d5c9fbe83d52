"""Random changes of training images, drawn from the sample's own stream. Images are ``(C, H, W)`` in [-1, 1].

Some can change many images at once, on any device: ``draw`` gives the random numbers of one image, ``many`` changes
``(B, C, H, W)`` by those of all. The images are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from asr_downstream.engine.values import Above, MaxShare, Number, check_values
from asr_downstream.errors import AsrError
from asr_downstream.files.configs import plain
from asr_downstream.registry import Registry, build

__all__ = ['AUGMENTATIONS', 'Augmentation', 'build_augmentations', 'check_many']

AUGMENTATIONS = Registry('augmentation', error=AsrError)
Augmentation = Callable[[Tensor, Generator], Tensor]


def build_augmentations(specs: Sequence[dict[str, Any]]) -> list[Augmentation]:
    """Build ``augment`` of a config.

    Raises:
        AsrError: a name or argument is not known.
    """
    return [build(AUGMENTATIONS, plain(spec)) for spec in specs]


def check_many(augmentations: Sequence[Any]) -> None:
    """Refuse augmentations that cannot change many images at once.

    Raises:
        AsrError: there are some.
    """
    if single := [type(a).__name__ for a in augmentations if not hasattr(a, 'draw') or not hasattr(a, 'many')]:
        raise AsrError(
            f"augment: {', '.join(single)} changes one image at a time, and images_in='device' needs draw() and "
            f"many(); use images_in='memory'"
        )


def uniform(stream: Generator, low: float, high: float) -> float:
    """Draw a number."""
    return low + (high - low) * float(torch.rand((), generator=stream))


@AUGMENTATIONS.register_module()
class Flip:
    """Mirror left and right, one time in two."""

    def __call__(self, image: Tensor, stream: Generator) -> Tensor:
        """Maybe mirror."""
        return image.flip(-1) if self.draw(stream) else image

    def draw(self, stream: Generator) -> Tensor:
        """Whether to."""
        return torch.rand((), generator=stream) < 0.5

    def many(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Mirror some."""
        return torch.where(drawn[:, None, None, None], images.flip(-1), images)


@AUGMENTATIONS.register_module()
class Crop:
    """Shift by up to ``padding`` pixels; what comes in is black."""

    def __init__(self, padding: int) -> None:
        check_values({'padding': Number}, {'padding': padding}, 'Crop')
        self.padding = padding

    def __call__(self, image: Tensor, stream: Generator) -> Tensor:
        """Shift."""
        height, width = image.shape[-2:]
        top, left = self.draw(stream).tolist()
        return self.wide(image)[:, top : top + height, left : left + width]

    def draw(self, stream: Generator) -> Tensor:
        """Upper left corner, in the wide image."""
        return torch.randint(2 * self.padding + 1, (2,), generator=stream)

    def many(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Shift each by its own."""
        count, channels, height, width = images.shape
        number, channel, row, column = (torch.arange(n, device=images.device) for n in (count, channels, height, width))
        rows, columns = drawn[:, :1] + row, drawn[:, 1:] + column
        place = number[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        return self.wide(images)[place]

    def wide(self, images: Tensor) -> Tensor:
        """Add a black frame."""
        return F.pad(images, (self.padding,) * 4, value=-1.0)


@AUGMENTATIONS.register_module()
class ResizedCrop:
    """Cut out a rectangle of ``scale`` times the area and ``ratio`` of width to height, and resize it back, bicubic.

    As RandomResizedCrop of torchvision, on the image at the resolution of the model.
    """

    def __init__(self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> None:
        for name, pair, kind in (('scale', scale, list[MaxShare]), ('ratio', ratio, list[Above])):
            check_values({name: kind}, {name: list(pair)}, 'ResizedCrop')
            if len(pair) != 2 or pair[0] > pair[1]:
                raise AsrError(f'ResizedCrop: {name}={pair} should be the least and the most')
        self.scale, self.ratio = scale, ratio

    def __call__(self, image: Tensor, stream: Generator) -> Tensor:
        """Cut out and resize."""
        height, width = image.shape[-2:]
        area = uniform(stream, *self.scale) * height * width
        ratio = math.exp(uniform(stream, math.log(self.ratio[0]), math.log(self.ratio[1])))
        h = min(height, max(1, round(math.sqrt(area / ratio))))
        w = min(width, max(1, round(math.sqrt(area * ratio))))
        top = int(torch.randint(height - h + 1, (), generator=stream))
        left = int(torch.randint(width - w + 1, (), generator=stream))
        part = image[None, :, top : top + h, left : left + w]
        return F.interpolate(part, (height, width), mode='bicubic', antialias=True)[0].clamp(-1, 1)


@AUGMENTATIONS.register_module()
class ColorJitter:
    """Change brightness, contrast and saturation by factors within ``1 +- strength``."""

    def __init__(self, strength: float = 0.3) -> None:
        check_values({'strength': MaxShare}, {'strength': strength}, 'ColorJitter')
        self.strength = strength

    def __call__(self, image: Tensor, stream: Generator) -> Tensor:
        """Change colours."""
        light, contrast, colour = (uniform(stream, 1 - self.strength, 1 + self.strength) for _ in range(3))
        x = (image / 2 + 0.5) * light
        x = (x - x.mean()) * contrast + x.mean()
        grey = x.mean(0, keepdim=True)
        return ((x - grey) * colour + grey).clamp(0, 1) * 2 - 1


@AUGMENTATIONS.register_module()
class Erasing:
    """Fill a rectangle of 2 to 33% of the area with noise, with probability ``p`` (random erasing, pixel mode)."""

    def __init__(self, p: float = 0.25) -> None:
        check_values({'p': MaxShare}, {'p': p}, 'Erasing')
        self.p = p

    def __call__(self, image: Tensor, stream: Generator) -> Tensor:
        """Maybe erase."""
        if uniform(stream, 0, 1) >= self.p:
            return image
        height, width = image.shape[-2:]
        area = uniform(stream, 0.02, 1 / 3) * height * width
        ratio = math.exp(uniform(stream, math.log(0.3), math.log(1 / 0.3)))
        h = min(height, max(1, round(math.sqrt(area / ratio))))
        w = min(width, max(1, round(math.sqrt(area * ratio))))
        top = int(torch.randint(height - h + 1, (), generator=stream))
        left = int(torch.randint(width - w + 1, (), generator=stream))
        image = image.clone()
        noise = torch.randn(image.shape[0], h, w, generator=stream)
        image[:, top : top + h, left : left + w] = noise.clamp(-1, 1)
        return image
