"""Models whose attention is replaced by LSTMs (FAR): folders of `save_far`."""

from __future__ import annotations

from pathlib import Path

import torch

from asr_downstream.commands.exporting.images import open_images, tensors_of
from asr_downstream.commands.exporting.kinds.base import Kind, Request
from asr_downstream.commands.exporting.kinds.classification import BATCH, batches
from asr_downstream.commands.exporting.kinds.diffusion import subject_of
from asr_downstream.commands.exporting.subject import Outputs, Subject

__all__ = ['Far']


class Far(Kind):
    """A folder with ``far.json``."""

    name = 'far'
    shipped = 'a folder of distill-far with far.json'

    def is_shipped(self, path: Path) -> bool:
        from asr_downstream.far.export import FAR_FILE

        return (path / FAR_FILE).is_file()

    def open(self, request: Request) -> Subject:
        from asr_downstream.far.export import FAR_FILE, load_far, read_facts

        folder = request.shipped
        facts, model = read_facts(folder), load_far(folder)
        sources = (folder / FAR_FILE, folder / 'config.json', *sorted(folder.glob('*.safetensors')))
        if facts['library'] == 'diffusers':
            return subject_of(model, request, self.name, sources)
        size, channels = model.config.image_size, model.config.num_channels
        given, data = torch.rand(8, channels, size, size, generator=torch.Generator().manual_seed(0)), 'random numbers'
        if request.data is not None:
            given, used = tensors_of(open_images(request.data, size, channels), request.images)
            data = f'{len(used)} images of {request.data}'
        return Subject(
            kind=self.name,
            name=type(model).__name__,
            model=Outputs(
                model, lambda model, image: {'logits': model(pixel_values=image, return_dict=False)[0]}, ('image',)
            ),
            calls=batches(given, 'image'),
            axes=(BATCH,),
            sources=sources,
            data=data,
        )
