"""Conditions of a model: none, a class, or a text. A condition computes the arguments of the model for a batch.

``drop`` is the share of samples that are trained without their condition, so that sampling can be guided away from the
unconditional prediction (classifier-free guidance, Ho and Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asr_downstream.diffusion.models.pretrained import load_whole
from asr_downstream.engine.data.sources import Source
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.configs import plain
from asr_downstream.registry import Registry, build

__all__ = ['CONDITIONS', 'ClassLabels', 'Condition', 'Text', 'build_condition']

CONDITIONS = Registry('condition', error=AsrError, key='condition')
# Which condition of those below a model takes, and the key of its number of classes.
TAKES = {'UNet2DModel': 'ClassLabels', 'DiTTransformer2DModel': 'ClassLabels', 'UNet2DConditionModel': 'Text'}
CLASSES = {'DiTTransformer2DModel': 'num_embeds_ada_norm'}


class Condition:
    """No condition; base class of the others."""

    drop = 0.0
    classes: tuple[str, ...] = ()
    encoder: Any = None  # frozen, moved to the device of the training

    def encode(self, index: int) -> Tensor:
        """Condition of image ``index`` as a tensor; runs in the workers."""
        return torch.tensor(-1)

    def arguments(self, encoded: Tensor, dropped: Tensor | None = None) -> dict[str, Any]:
        """Arguments of the model for stacked results of `encode`; without condition where ``dropped`` is true."""
        return {}

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Conditions of generated images: they take turns."""
        return torch.full((len(numbers),), -1)

    def like_data(self, numbers: Sequence[int], order: Sequence[int]) -> Tensor:
        """Conditions of generated images as they are in the data: image ``n`` gets that of ``order[n]``."""
        return torch.stack([self.encode(order[number % len(order)]) for number in numbers])

    def choose(self, names: Sequence[str]) -> None:
        """Let generated images take turns through these classes or prompts.

        Raises:
            AsrError: there are none to choose from, or one is not known.
        """
        raise AsrError('the run has no condition: there is nothing to choose with --show')

    def caption(self, number: int) -> str:
        """Condition of generated image ``number``, for people: it stands below the image in grids."""
        return ''

    def caption_of(self, index: int) -> str:
        """Condition of image ``index`` of the data, for people."""
        return ''

    def complete(self, spec: dict[str, Any] | None) -> dict[str, Any] | None:
        """Spec with what the data has given, so that it can be built without the data."""
        return spec


@CONDITIONS.register_module()
class ClassLabels(Condition):
    """Class labels: the folders of the images, or the labels of the data set.

    Args:
        source: where the labels come from; None where no data is needed.
        model: UNet with ``num_class_embeds``, or DiT with ``num_embeds_ada_norm``.
        drop: see the module; the number after the last class then means 'no class'.
        classes: names of the classes; by default those of the data.

    Raises:
        AsrError: there are no labels, or model or data have other classes.
    """

    def __init__(
        self, source: Source | None, model: Any, drop: float = 0.0, classes: Sequence[str] | None = None
    ) -> None:
        if source is not None and source.labels is None:
            raise AsrError(without_classes(source, model))
        if source is not None and classes is not None and tuple(classes) != source.classes:
            raise AsrError(f'condition: the data has the classes {list(source.classes)}, not {list(classes)}')
        check_drop(drop)
        self.labels = [] if source is None else source.labels or []
        self.classes = tuple(classes or ()) if source is None else source.classes
        self.shown = list(range(len(self.classes)))
        self.drop = drop
        key = classes_key(model)
        transformer = key == 'num_embeds_ada_norm'
        needed = len(self.classes) + (1 if drop and not transformer else 0)  # DiT adds its own
        if model.config.get(key) != needed:
            why = f'{len(self.classes)} classes'
            if drop:
                why += '; DiT adds the one for no class itself' if transformer else ' and one for no class, as drop > 0'
            raise AsrError(f'condition: model.{key}={model.config.get(key)} should be {needed} ({why})')

    def encode(self, index: int) -> Tensor:
        """Label ``()``."""
        return torch.tensor(self.labels[index])

    def arguments(self, encoded: Tensor, dropped: Tensor | None = None) -> dict[str, Any]:
        """``class_labels`` ``(B,)``."""
        if dropped is not None:
            encoded = torch.where(dropped, len(self.classes), encoded)
        return {'class_labels': encoded}

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Labels ``(B,)``."""
        return torch.tensor([self.shown[number % len(self.shown)] for number in numbers])

    def choose(self, names: Sequence[str]) -> None:
        """Let generated images take turns through these classes.

        Raises:
            AsrError: a class is not known.
        """
        for name in names:
            if name not in self.classes:
                raise AsrError(f'{name!r} is not a class; {did_you_mean(name, self.classes)}')
        self.shown = [self.classes.index(name) for name in names]

    def caption(self, number: int) -> str:
        """Name of the class."""
        return self.classes[self.shown[number % len(self.shown)]]

    def caption_of(self, index: int) -> str:
        """Name of the class."""
        return self.classes[self.labels[index]]

    def complete(self, spec: dict[str, Any] | None) -> dict[str, Any] | None:
        """With the names of the classes."""
        return {**(spec or {}), 'classes': list(self.classes)}


@CONDITIONS.register_module()
class Text(Condition):
    """Captions, through a frozen CLIP text encoder, as ``encoder_hidden_states``.

    Args:
        source: where the captions come from.
        model: UNet2DConditionModel whose ``cross_attention_dim`` is the width of the encoder.
        pretrained_model_name_or_path: folder or id of a pipeline with ``tokenizer`` and ``text_encoder``.
        prompts: texts of the sample grids; by default the first captions of the data.
        drop: see the module.

    Raises:
        AsrError: the encoder cannot be loaded or has another width.
    """

    def __init__(
        self,
        source: Source | None,
        model: Any,
        pretrained_model_name_or_path: str,
        prompts: Sequence[str] = (),
        drop: float = 0.0,
    ) -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise AsrError(f'Text needs transformers ({error}); install it with: pip install transformers') from error
        path = pretrained_model_name_or_path
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(path, subfolder='tokenizer')
            spec = {'pretrained_model_name_or_path': path, 'subfolder': 'text_encoder'}
            self.encoder = load_whole(CLIPTextModel, 'condition', **spec).requires_grad_(False).eval()
        except (OSError, ValueError, TypeError) as error:
            raise AsrError(
                f'condition: {path} has no tokenizer and text_encoder that can be loaded '
                f'({str(error).strip().splitlines()[0]})'
            ) from error
        width, expected = self.encoder.config.hidden_size, model.config.get('cross_attention_dim')
        if expected != width:
            raise AsrError(f'condition: model.cross_attention_dim={expected} should be {width}, the width of {path}')
        check_drop(drop)
        self.source = source
        self.drop = drop
        self.prompts = list(prompts)
        if not self.prompts:
            self.prompts = [''] if source is None else [source.caption(index) for index in range(min(4, len(source)))]

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids ``(B, L)``."""
        length = min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        found = self.tokenizer(texts, padding='max_length', max_length=length, truncation=True, return_tensors='pt')
        return found.input_ids

    def encode(self, index: int) -> Tensor:
        """Token ids ``(L,)``."""
        assert self.source is not None
        return self.tokens([self.source.caption(index)])[0]

    @torch.no_grad()
    def arguments(self, encoded: Tensor, dropped: Tensor | None = None) -> dict[str, Any]:
        """``encoder_hidden_states`` ``(B, L, width)``."""
        if dropped is not None:
            encoded = torch.where(dropped[:, None], self.tokens(['']).to(encoded), encoded)
        return {'encoder_hidden_states': self.encoder(encoded).last_hidden_state}

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Token ids ``(B, L)``."""
        return self.tokens([self.caption(number) for number in numbers])

    def choose(self, names: Sequence[str]) -> None:
        """Let generated images take turns through these prompts."""
        self.prompts = list(names)

    def caption(self, number: int) -> str:
        """The prompt."""
        return self.prompts[number % len(self.prompts)]

    def caption_of(self, index: int) -> str:
        """The caption."""
        assert self.source is not None
        return self.source.caption(index)

    def complete(self, spec: dict[str, Any] | None) -> dict[str, Any] | None:
        """With the prompts."""
        return {**(spec or {}), 'prompts': list(self.prompts)}


def check_drop(drop: float) -> None:
    """Refuse a share outside of [0, 1)."""
    if not 0 <= drop < 1:
        raise AsrError(f'condition: drop={drop} should be a share of the samples, from 0 to below 1')


def build_condition(spec: dict[str, Any] | None, source: Source | None, model: Any) -> Condition:
    """Build ``condition`` of a config.

    Raises:
        AsrError: a name or argument is not known, or it does not fit data or model.
    """
    check_taken(None if spec is None else spec.get('type'), source, model)
    if spec is None:
        return Condition()
    return build(CONDITIONS, plain(spec), {'source': source, 'model': model})


def check_taken(name: str | None, source: Source | None, model: Any) -> None:
    """Refuse a condition that a model does not take, or none where it needs one; of a user's own nothing is known.

    Raises:
        AsrError: see above.
    """
    kind, classes = type(model).__name__, model.config.get(classes_key(model))
    taken = TAKES.get(kind)
    if name in TAKES.values() and taken not in (name, None):
        models = ' or '.join(repr(model) for model, takes in TAKES.items() if takes == name)
        raise AsrError(
            f'condition: {kind} takes no {name}; use condition=dict(type={taken!r}, ...), or a model of type={models}'
        )
    if taken == 'Text' and name in (None, 'Text'):
        if name is None:
            raise AsrError(f"condition: {kind} needs condition=dict(type='Text', ...)")
        if classes:
            raise AsrError(f'condition: Text gives no classes; leave num_class_embeds={classes} out of the model')
    elif name is None and kind in CLASSES:
        if source is not None and source.labels is None:
            raise AsrError(without_classes(source, model))
        number = f'model.{CLASSES[kind]}={len(source.classes)}' if source is not None else 'their number in the model'
        raise AsrError(
            f"condition: {kind} always takes a class; add condition=dict(type='ClassLabels'), with {number}, or take "
            f"type='UNet2DModel' to train without classes"
        )
    elif name is None and classes:
        raise AsrError(
            f'condition: the model has class embeddings but the config has no condition; add condition=dict('
            f"type='ClassLabels'), or leave num_class_embeds={classes} out of the model"
        )


def classes_key(model: Any) -> str:
    """Key of the number of classes in the config of a model."""
    return CLASSES.get(type(model).__name__, 'num_class_embeds')


def without_classes(source: Source, model: Any) -> str:
    """Message for images without classes and a model that should have some."""
    kind = type(model).__name__
    if kind in CLASSES:
        why, other = f', and {kind} always takes one', "take type='UNet2DModel' to train without classes"
    else:
        why, other = '', 'train without: leave condition and model.num_class_embeds out'
    return (
        f'condition: the images of {type(source).__name__} have no classes{why}; put each class into a folder of its '
        f"name and use condition=dict(type='ClassLabels'), or {other}"
    )
