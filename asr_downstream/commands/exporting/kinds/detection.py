"""Detectors that `fold` has shipped: feature maps and raw outputs of the heads; some of them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from asr_downstream.commands.exporting.kinds.base import Kind, Request
from asr_downstream.commands.exporting.subject import Axes, Outputs, Subject, refuse_gates
from asr_downstream.commands.exporting.whole.plan import NotWhole, plan_of
from asr_downstream.errors import AsrError
from asr_downstream.files.configs import plain

__all__ = ['Detection', 'raw_outputs']

SUFFIXES = ('.pth', '.safetensors')
FOLD = 'fold it: asr-downstream fold CONFIG CHECKPOINT OUT'
HEADS = ('bbox_head', 'rpn_head')  # attributes of detectors: heads that take feature maps alone
MULTIPLE = 32  # what sizes of images are padded to


class Detection(Kind):
    """A checkpoint, with its config beside it."""

    name = 'detection'
    shipped = 'the file of fold, detector.pth or .safetensors, with its config detector.py beside it'

    def is_shipped(self, path: Path) -> bool:
        return path.is_file() and path.suffix in SUFFIXES

    def open(self, request: Request) -> Subject:
        from asr_downstream.commands.exporting.whole.files import Whole
        from asr_downstream.detection.config import load_config
        from asr_downstream.detection.models.detectors import load_detector

        given = request.config or request.shipped.with_suffix('.py')
        if not given.is_file():
            raise AsrError(f'{given}: no such config; {request.shipped} needs its own beside it, or --config CONFIG')
        config = load_config(given, request.data, needs_data=request.data is not None)
        model: Any
        model, _ = load_detector(config, request.shipped, request.trust)
        refuse_gates(model, request.shipped, FOLD)
        images, data = random_images(), 'random numbers'
        if request.data is not None:
            images = images_of_set(config, model, min(request.images, 16))
            data = f'{len(images)} images of {request.data}'
        about: dict[str, Any] = {'classes': list(plain((model.dataset_meta or {}).get('classes', ())))}
        whole = None
        if request.data is not None:
            try:
                whole = Whole(config, model, plan_of(config, model), about['classes'], request.images)
            except NotWhole as error:
                about['whole'] = f'no: {error}'
        first = images[0]
        calls = [{'image': torch.cat([first, first.flip(-1)])}, *({'image': image} for image in images)]
        sized: Axes = {'image': {0: ('batch', 1), 2: ('height', MULTIPLE), 3: ('width', MULTIPLE)}}
        return Subject(
            kind=self.name,
            name=type(model).__name__,
            model=Outputs(model, raw_outputs, ('image',)),
            calls=calls,
            axes=(sized, {'image': {0: ('batch', 1)}}),
            sources=(request.shipped, given),
            data=data,
            whole=whole,
            about=about,
        )


def raw_outputs(model: Any, image: torch.Tensor) -> dict[str, Any]:
    """Feature maps of a detector, and what its first head makes of them."""
    features = model.extract_feat(image)
    head = next((getattr(model, name) for name in HEADS if getattr(model, name, None) is not None), None)
    found: dict[str, Any] = {'features': list(features)}
    if head is not None and not hasattr(model, 'decoder'):
        found['head'] = list(head(features))
    return found


def random_images() -> list[torch.Tensor]:
    """Two random images of other sizes."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, *size, generator=draw) for size in ((160, 160), (128, 192))]


def images_of_set(config: Any, model: Any, count: int) -> list[torch.Tensor]:
    """First images of the test set as the detector is given them, each padded for itself."""
    from mmengine.runner import Runner

    loader = {**config.test_dataloader, 'batch_size': 1, 'num_workers': 0, 'persistent_workers': False}
    found = []
    for batch in Runner.build_dataloader(loader):
        found.append(padded(model.data_preprocessor(batch, False)['inputs']))
        if len(found) == count:
            break
    return found


def padded(image: torch.Tensor) -> torch.Tensor:
    """Pad a batch to multiples of `MULTIPLE`."""
    height, width = image.shape[-2:]
    return torch.nn.functional.pad(image, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
