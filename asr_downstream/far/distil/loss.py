"""The distillation loss: distances between features of teacher and student at every replaced attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.far.model.attentions import has
from asr_downstream.far.model.lstm import VARIANTS
from asr_downstream.far.model.replace import Place
from asr_downstream.far.model.trainable import block_of
from asr_downstream.files.configs import plain
from asr_downstream.registry import Registry, build

__all__ = ['DISTANCES', 'FEATURES', 'Distance', 'Features', 'check_feature']

Output = TypeVar('Output')
DISTANCES = Registry('distance')
FEATURES = {
    'heads': 'outputs of the heads before the output projection, (B, N, C)',
    'attention': 'output of the attention, after its projection; in UNets, with its shortcut, (B, C, H, W)',
    'block': 'output of the block that the attention is in, after its MLP and shortcuts; UNet2DModel: as attention',
}


class Features(AbstractContextManager['Features']):
    """Collects a feature of each replaced attention during forwards inside the block.

    Args:
        model: teacher or student.
        places: of the teacher.
        feature: a key of `FEATURES`.

    Attributes:
        found: path -> tensor of the last forward.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place], feature: str) -> None:
        self.model, self.places, self.feature = model, places, feature
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> Features:
        self.found, self.handles = {}, []
        for place in self.places:
            if self.feature == 'heads':
                layer = self.model.get_submodule(f'{place.path}.{place.host.projection}')
                self.handles.append(layer.register_forward_pre_hook(self.before(place.path)))
            else:
                path = place.path if self.feature == 'attention' else block_of(self.model, place.path)
                self.handles.append(self.model.get_submodule(path).register_forward_hook(self.after(place.path)))
        return self

    def before(self, path: str) -> Callable[..., None]:
        """Hook that keeps an input."""

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.found[path] = args[0]

        return keep

    def after(self, path: str) -> Callable[..., None]:
        """Hook that keeps an output."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.found[path] = output[0] if isinstance(output, tuple) else output

        return keep

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


class Distance:
    """The distance between teacher and student: which feature, which distance, and its weight in the loss.

    Args:
        spec: ``dict(type='MSE', feature='heads', weight=1.0)``: a key of `DISTANCES` with its arguments.
        variant: of the replacements.
        feature: if the spec has none.

    Raises:
        PlugError: a name is not known, or the variant has no such feature.
    """

    def __init__(self, spec: dict[str, Any], variant: str = 'M3', feature: str = 'heads') -> None:
        arguments = plain(spec)
        self.feature: str = arguments.pop('feature', feature)
        self.weight: float = arguments.pop('weight', 1.0)
        self.variant = variant
        if type(self.weight) not in (int, float) or not 0 <= self.weight < math.inf:
            raise PlugError(f'distance: weight={self.weight!r} should be a finite number of at least 0')
        check_feature(self.feature, variant, ())
        self.distance: Any = build(DISTANCES, arguments)

    def measure(
        self,
        teacher: nn.Module,
        teach: Callable[[], object],
        student: nn.Module,
        learn: Callable[[], Output],
        places: Sequence[Place],
    ) -> tuple[Output, dict[str, Tensor]]:
        """Run teacher and student on the same inputs, and compare them at every place.

        Args:
            teacher: the stock model.
            teach: runs it; no gradients are kept.
            student: the model whose attention was replaced.
            learn: runs it.
            places: of the replaced attentions.

        Returns:
            What ``learn`` returned, and path -> distance, unweighted.
        """
        with torch.no_grad(), Features(teacher, places, self.feature) as wanted:
            teach()
        with Features(student, places, self.feature) as own:
            output = learn()
        return output, {p.path: self.distance(own.found[p.path], wanted.found[p.path]) for p in places}


def check_feature(feature: str, variant: str, places: Sequence[Place]) -> None:
    """Refuse a feature that teacher and student do not both have.

    Raises:
        PlugError: it is not known, or cannot be compared.
    """
    if feature not in FEATURES:
        raise PlugError(f'distance: feature={feature!r} is not known; {did_you_mean(str(feature), FEATURES)}')
    if feature != 'heads':
        return
    if not VARIANTS[variant].head_proj:
        raise PlugError(
            f"distance: feature='heads' needs variant M2 or M3; {variant} has no outputs of heads of the teacher's "
            f"size, use feature='attention' or 'block'"
        )
    for place in places:
        if not place.host.hooked or not has(place.attention, place.host.projection):
            raise PlugError(
                f"distance: feature='heads' cannot be seen in {place.path}: {type(place.attention).__name__} does not "
                f"call its projection as a module; use feature='attention' or 'block'"
            )


@DISTANCES.register_module()
class MSE:
    """Mean squared error over all elements (the authors' code from October 2025 on)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of two features of one shape."""
        return F.mse_loss(student.float(), teacher.float())


@DISTANCES.register_module()
class Cosine:
    """One minus the mean cosine similarity.

    Args:
        axis: what a vector is: ``'tokens'`` (all tokens of one channel, as the authors' code has it: dim 1 of
            ``(B, N, C)``) or ``'channels'`` (all channels of one token, the usual reading).

    Of maps ``(B, C, H, W)``, such as those of UNets, the pixels are the tokens.
    """

    def __init__(self, axis: str = 'tokens') -> None:
        if axis not in ('tokens', 'channels'):
            raise PlugError(f"distance: axis={axis!r} should be 'tokens' or 'channels'")
        self.axis = axis

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of two features of one shape."""
        if student.ndim == 4:
            student, teacher = (t.flatten(2).mT for t in (student, teacher))
        dim = 1 if self.axis == 'tokens' else -1
        return 1 - torch.cosine_similarity(student.float(), teacher.float(), dim=dim).mean()
