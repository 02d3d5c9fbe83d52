"""The distillation loss: distances between teacher and student at every replaced attention, and between logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.far.model.attentions import has
from asr_downstream.far.model.mixer import VARIANTS
from asr_downstream.far.model.replace import Place
from asr_downstream.far.model.trainable import block_of
from asr_downstream.files.configs import plain
from asr_downstream.registry import Registry, build

__all__ = ['DISTANCES', 'FEATURES', 'Distance', 'Distances', 'Features', 'check_feature']

Output = TypeVar('Output')
DISTANCES = Registry('distance')
FEATURES = {
    'heads': 'outputs of the heads before the output projection, (B, N, C)',
    'attention': 'output of the attention, after its projection; in UNets, with its shortcut, (B, C, H, W)',
    'block': 'output of the block that the attention is in, after its MLP and shortcuts; UNet2DModel: as attention',
    'logits': 'output of a classifier, (B, classes)',
}
LOGITS = 'logits'


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
    """One distance between teacher and student: which feature, which distance, and its weight in the loss.

    Args:
        spec: ``dict(type='MSE', feature='heads', weight=1.0)``: a key of `DISTANCES` with its arguments.
        variant: of the replacements.
        feature: if the spec has none, and the distance is of any.

    Raises:
        PlugError: a name is not known, or the distance is not of such a feature, or the variant has none.
    """

    def __init__(self, spec: dict[str, Any], variant: str = 'M3', feature: str = 'heads') -> None:
        arguments = plain(spec)
        given: Any = arguments.pop('feature', None)
        self.weight: float = arguments.pop('weight', 1.0)
        self.variant = variant
        if type(self.weight) not in (int, float) or not 0 <= self.weight < math.inf:
            raise PlugError(f'distance: weight={self.weight!r} should be a finite number of at least 0')
        self.distance: Any = build(DISTANCES, arguments)
        self.type: str = arguments['type']
        takes = getattr(self.distance, 'features', (feature, *FEATURES))
        self.feature: str = takes[0] if given is None else given
        check_feature(self.feature, variant, ())
        if self.feature not in takes:
            raise PlugError(f'distance: {self.type} is of {" or ".join(takes)}; compare {given!r} by MSE or Cosine')

    def between(self, own: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Distance at each path, for the features of student and teacher there."""
        return {path: self.distance(own[path], value) for path, value in wanted.items()}


class Distances:
    """All distances of a training, for which teacher and student run once each.

    Args:
        specs: of a `Distance`, or a list of them.
        variant: of the replacements.
        feature: if a spec has none.
        logits: reads those of a classifier from what teacher or student returned; None: there are none.

    Raises:
        PlugError: a spec makes no sense, is there twice, or asks for logits where there are none.
    """

    def __init__(
        self,
        specs: Any,
        variant: str = 'M3',
        feature: str = 'heads',
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        given = list(specs) if isinstance(specs, list | tuple) else [specs]
        self.logits = logits
        self.each = {name_of(d): d for d in (Distance(spec, variant, feature) for spec in given)}
        if len(self.each) < len(given) or not given:
            raise PlugError(f'distance: {plain(given)} should be one or more, each with another type or feature')
        if logits is None and any(d.feature == LOGITS for d in self.each.values()):
            raise PlugError(
                "distance: feature='logits' needs a task with logits, such as Classification, and this one has none; "
                "compare 'heads', 'attention' or 'block'"
            )

    def check(self, variant: str, places: Sequence[Place]) -> None:
        """Refuse features that teacher and student do not both have at these places.

        Raises:
            PlugError: see `check_feature`.
        """
        for distance in self.each.values():
            check_feature(distance.feature, variant, places)

    @property
    def placed(self) -> list[str]:
        """Features that are seen inside of the models, each once."""
        return [name for name in dict.fromkeys(d.feature for d in self.each.values()) if name != LOGITS]

    def measure(
        self,
        teacher: nn.Module,
        teach: Callable[[], object],
        student: nn.Module,
        learn: Callable[[], Output],
        places: Sequence[Place],
    ) -> tuple[Output, Tensor, dict[str, Tensor]]:
        """Run teacher and student on the same inputs, and compare them.

        Args:
            teacher: the stock model.
            teach: runs it; no gradients are kept.
            student: the model whose attention was replaced.
            learn: runs it.
            places: of the replaced attentions.

        Returns:
            What ``learn`` returned; the weighted sum of all distances; and for a log, unweighted, each distance: its
            sum over the places as ``distance``, or ``distance/MSE-heads`` if there are several, and each place.
        """
        with torch.no_grad():
            _, wanted = self.seen(teacher, teach, places)
        output, own = self.seen(student, learn, places)
        total: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for name, distance in self.each.items():
            prefix = 'distance' if len(self.each) == 1 else f'distance/{name}'
            found = distance.between(own[distance.feature], wanted[distance.feature])
            parts |= {f'{prefix}/{path}': value for path, value in found.items() if path}
            parts[prefix] = torch.stack([*found.values()]).sum()
            total.append(distance.weight * parts[prefix])
        return output, torch.stack(total).sum(), parts

    def seen(
        self, model: nn.Module, run: Callable[[], Output], places: Sequence[Place]
    ) -> tuple[Output, dict[str, dict[str, Tensor]]]:
        """Run a model; feature -> path -> tensor, of which logits have no path."""
        with ExitStack() as stack:
            features = {name: stack.enter_context(Features(model, places, name)) for name in self.placed}
            output = run()
        found = {name: feature.found for name, feature in features.items()}
        if self.logits is not None and any(d.feature == LOGITS for d in self.each.values()):
            found[LOGITS] = {'': self.logits(output)}
        return output, found


def name_of(distance: Distance) -> str:
    """Name of one of several distances in a log."""
    return f'{distance.type}-{distance.feature}'


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


def precise(feature: Tensor) -> Tensor:
    """A feature in at least float32."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


@DISTANCES.register_module()
class MSE:
    """Mean squared error over all elements (the authors' code from October 2025 on)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of two features of one shape."""
        return F.mse_loss(precise(student), precise(teacher))


@DISTANCES.register_module()
class KL:
    """Divergence of the student's classes from the teacher's, both softened, times temperature squared.

    ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over images (Hinton et al., arXiv 1503.02531).

    Args:
        temperature: T; 1 are the probabilities themselves.
    """

    features = (LOGITS,)

    def __init__(self, temperature: float = 2.0) -> None:
        if not temperature > 0:
            raise PlugError(f'distance: temperature={temperature!r} should be greater than 0')
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of two logits ``(B, classes)``."""
        own, wanted = (F.log_softmax(precise(t) / self.temperature, -1) for t in (student, teacher))
        return F.kl_div(own, wanted, reduction='batchmean', log_target=True) * self.temperature**2


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
        return 1 - torch.cosine_similarity(precise(student), precise(teacher), dim=dim).mean()
