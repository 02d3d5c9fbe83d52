"""The model card of a folder of `asr_downstream.far.save_far`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from asr_downstream.far.model.describe import describe, mixers
from asr_downstream.files.card import add_results, card_text, measured
from asr_downstream.measure.cost import parameters

__all__ = ['card', 'note_accuracy']

INSIDE = ('library', 'class', 'dtype', 'replace', 'versions', 'name')  # what the table of facts leaves out


def card(content: dict[str, Any], model: nn.Module) -> str:
    """Text of ``README.md``.

    Args:
        content: of ``far.json``.
        model: that is shipped.
    """
    name, library, kind = content.get('name', content['class']), content['library'], content['class']
    if content['replace'] is None:
        head: tuple[str, list[str]] = library, [kind]
        what = f'A stock `{kind}` of {library} with {parameters(model):,} parameters.'
        use = f"from {library} import {kind}\n\nmodel = {kind}.from_pretrained('FOLDER').eval()"
    else:
        rows = describe(model).rows
        head = 'asr_downstream', [library, 'far', rows[0].mixer]
        units, full = sum(row.units for row in rows), sum(row.full for row in rows)
        what = (
            f'A `{kind}` of {library} with {parameters(model):,} parameters, of which {len(rows)} self-attentions are '
            f'replaced by {next(mixers(model))[1].note}, form {rows[0].variant}'
            + (f', with {units:,} of {full:,} hidden units' if full else '')
            + f'. {library} alone cannot load it: the package asr_downstream builds what stands there.'
        )
        use = "from asr_downstream.far import load_far\n\nmodel = load_far('FOLDER')"
    facts = ''.join(f'| {key} | `{value}` |\n' for key, value in content.items() if key not in INSIDE)
    table = f'\n| | |\n|---|---|\n{facts}' if facts else ''
    text = f'# {name}\n\n{what}\n\n```python\n{use}\n```\n{table}'
    return card_text(text, str(name), head[0], {}, head[1])


def note_accuracy(folder: Path, name: str, accuracy: float, data: str, images: int) -> None:
    """Write the accuracy of a shipped classifier into the metadata of its card, if it has one.

    Args:
        folder: of `asr_downstream.far.save_far`.
        name: of the model.
        accuracy: in [0, 1].
        data: name of the data.
        images: number of images of it that were held out, on which it was measured.

    Raises:
        AsrError: the card cannot be read or written.
    """
    numbers = {'accuracy': ('accuracy', accuracy)}
    results = measured('image-classification', data, numbers, 'held out', {'images': images})
    add_results(folder / 'README.md', name, results)
