"""Folders with a trained classifier: stock weights as safetensors, what builds the model, and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from asr_downstream.classification.models import build_classifier
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import first_line, read_json, sha256, whole_folder, write_json
from asr_downstream.files.card import card_text, measured
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.measure.cost import parameters
from asr_downstream.measure.versions import versions
from asr_downstream.modules.slots import HasGates
from asr_downstream.plugging.load import folder_path
from asr_downstream.plugging.save import safe_state
from asr_downstream.plugging.weights import check_weights_finite, load_state

__all__ = ['CONFIG', 'WEIGHTS', 'check_target', 'is_shipped', 'load_classifier', 'save_classifier']

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
FORMAT = 1


def save_classifier(model: nn.Module, folder: Path, facts: dict[str, Any]) -> Path:
    """Write a stock classifier to a folder, whole or not at all; `load_classifier` reads it.

    Args:
        model: without gates.
        folder: is replaced if it is such a folder already.
        facts: of the model: ``model``, the spec that builds it, ``classes``, and of its images ``resolution``,
            ``channels``, ``image_mean`` and ``image_std``; of the training: ``training``, a dict, and ``accuracy`` on
            so many ``images`` of ``data``.

    Raises:
        AsrError: the model has gates, or the folder is something else or cannot be written.
    """
    if any(isinstance(module, HasGates) for module in model.modules()):
        raise AsrError(f'{folder}: the {type(model).__name__} has gates; fold it first')
    check_target(folder)
    state = safe_state({name: value.cpu() for name, value in model.state_dict().items()})
    content = {'format': FORMAT, 'class': type(model).__name__, **facts, 'versions': versions()}
    with whole_folder(folder, sum(value.nbytes for value in state.values())) as aside:
        save_file(state, aside / WEIGHTS, {'format': 'pt'})
        write_json(aside / CONFIG, {**content, 'files': {WEIGHTS: sha256(aside / WEIGHTS)}})
        (aside / 'README.md').write_text(card(content, model), encoding='utf-8')
        again = load_classifier(aside).state_dict()
        if again.keys() != state.keys() or not all(again[name].equal(value) for name, value in state.items()):
            raise AsrError(f'{folder}: what was written does not read back as it was; check the disk')
    return folder


def check_target(folder: Path) -> None:
    """Refuse to replace a folder that `save_classifier` has not written.

    Raises:
        AsrError: see above.
    """
    if folder.exists() and not is_shipped(folder):
        raise AsrError(f'{folder}: exists and is no shipped classifier; move it')


def is_shipped(folder: Path) -> bool:
    """Whether a folder looks as `save_classifier` leaves it."""
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get('format'), int) and 'model' in content


def load_classifier(folder: Path | str) -> nn.Module:
    """Read what `save_classifier` wrote: the stock model, in eval mode, on the CPU.

    A class of your own has to be registered before, see `asr_downstream.classification.models`.

    Raises:
        CheckpointError: it is no such folder, or something in it is damaged.
        AsrError: the class of the model is not known.
    """
    folder = folder_path(folder, 'load_classifier')
    if not is_shipped(folder):
        raise CheckpointError(f'{folder}: has no {CONFIG} of a shipped classifier; give a folder that train-cls wrote')
    content, weights = read_json(folder / CONFIG), folder / WEIGHTS
    try:
        spec, classes, expected = content['model'], len(content['classes']), content['files'][WEIGHTS]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f'{folder / CONFIG}: is damaged ({first_line(error)}); copy the folder again') from error
    if not weights.is_file() or sha256(weights) != expected:
        raise CheckpointError(f'{weights}: is missing, damaged, or was changed since it was written; copy it again')
    model = build_classifier(spec, classes)
    state = state_dict_of(read_checkpoint(weights), weights)
    check_weights_finite(state, weights, model)
    load_state(model, state, weights)
    return model.eval()


def card(content: dict[str, Any], model: nn.Module) -> str:
    """Text of ``README.md``."""
    spec = {key: value for key, value in content['model'].items() if key != 'type'}
    training, images = content['training'], content['images']
    name = f'{content["class"]} {spec.get("depth", "")}'.strip()
    arguments = ', '.join(f'{key}={value!r}' for key, value in spec.items())
    use = 'from asr_downstream.classification.export import load_classifier\n\nmodel = load_classifier("FOLDER")'
    if content['model'].get('type') == 'ResNet':
        use = (
            'from safetensors.torch import load_file\nfrom asr_downstream.models.resnet_cifar import resnet\n\n'
            f"model = resnet({arguments})\nmodel.load_state_dict(load_file('FOLDER/{WEIGHTS}'))\nmodel.eval()"
        )
    facts = {
        'images': f'{content["resolution"]} pixels, {content["channels"]} channels',
        'mean, standard deviation': f'{content["image_mean"]}, {content["image_std"]}',
        'classes': ', '.join(content['classes']),
        'trained with': 'no attention' if training['plug'] is None else f'`{json.dumps(training["plug"])}`',
        'seed, steps': f'{training["seed"]}, {training["step"]:,}',
        'accuracy': f'{content["accuracy"]:.4f} on {images:,} images held out of {content["data"]}',
    }
    rows = ''.join(f'| {key} | {value} |\n' for key, value in facts.items())
    what = f'A stock `{content["class"]}` with {parameters(model):,} parameters'
    text = f'# {name}\n\n{what}, to be used as it is.\n\n```python\n{use}\n```\n\n| | |\n|---|---|\n{rows}'
    numbers = {'accuracy': ('accuracy', content['accuracy'])}
    results = measured('image-classification', content['data'], numbers, 'held out', {'images': images})
    return card_text(text, name, 'asr_downstream', {}, ['image-classification'], results)
