"""Gates over a training: their statistics every so many steps, in ``gates.jsonl`` of the run.

Gates that depend on the input are seen in the forwards of the training itself, over as many steps as give enough
images; constant ones are read once. Nothing that is trained changes by it, and no forward is added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import DataError
from asr_downstream.files.atomic import write_atomically, writing
from asr_downstream.folding.analysis.gates import CONSTANT, INPUT, places_of
from asr_downstream.folding.constancy import Moments
from asr_downstream.plugging.record import record

__all__ = ['FILE', 'GateRecorder', 'read_training']

FILE = 'gates.jsonl'


class GateRecorder:
    """Writes a line each time.

    Args:
        model: plugged; not wrapped by DDP.
        path: file to write.
        every: number of steps from line to line; the first step has one, too.
        images: that a line is about, at least.
        start: steps done before; lines of later ones are dropped.
    """

    def __init__(self, model: nn.Module, path: Path, every: int, images: int = 64, start: int = 0) -> None:
        self.model, self.path, self.every, self.images = model, path, every, images
        self.places = {path: place for path, place in places_of(model).items() if place.kind in (CONSTANT, INPUT)}
        self.watching: ExitStack | None = None
        kept = [row for row in read_training(path) if row['step'] <= start] if start and path.is_file() else []
        write_atomically(path, lambda p: p.write_text(''.join(json.dumps(row) + '\n' for row in kept)))

    def before(self, step: int) -> None:
        """Begin to watch, if the step, counted from 1, is due."""
        if self.watching is None and self.places and (step == 1 or step % self.every == 0):
            self.watching, self.step = ExitStack(), step
            self.seen = self.watching.enter_context(record(self.model, constant=False))
            self.moments: dict[str, Moments] = {}

    def after(self, step: int) -> None:
        """Take the gates of a step, and write a line if there are enough images."""
        if self.watching is None:
            return
        for path, gates in self.seen.gates.items():
            for g in gates:
                self.moments.setdefault(path, Moments()).add(g)
            gates.clear()
        for states in self.seen.states.values():
            states.clear()
        counts = [moments.count for moments in self.moments.values()]
        moving = any(place.kind == INPUT for place in self.places.values())
        if not moving or (counts and min(counts) >= self.images):
            self.write()
            self.close()

    @torch.no_grad()
    def write(self) -> None:
        """Write the line."""
        sites = {}
        for path, place in self.places.items():
            if place.kind == INPUT and path in self.moments:
                moments = self.moments[path]
                sites[path] = row_of(moments.mean, moments.std, moments.count)
            elif place.kind == CONSTANT:
                layer: Any = self.model.get_submodule(path)
                gates = layer.constant().double()
                sites[path] = row_of(gates, torch.zeros_like(gates), 1)
        with writing(self.path), self.path.open('a') as file:
            file.write(json.dumps({'step': self.step, 'sites': sites}) + '\n')

    def close(self) -> None:
        """Stop watching."""
        if self.watching is not None:
            self.watching.close()
            self.watching = None


def row_of(mean: Tensor, std: Tensor, samples: int) -> dict[str, Any]:
    """Statistics of the gates of a site: means of the channels, and numbers over samples and channels."""
    over_samples, over_channels = float(std.mean()), float(mean.std(unbiased=False))
    ratio = over_samples / over_channels if over_channels else None
    return {
        'samples': samples,
        'mean': float(mean.mean()),
        'over_samples': over_samples,
        'over_channels': over_channels,
        'stripe_ratio': 0.0 if over_samples == 0 else ratio,
        'channel_means': [round(value, 5) for value in mean.tolist()],
    }


def read_training(path: Path) -> list[dict[str, Any]]:
    """Read what a recorder has written.

    Raises:
        DataError: a line within is damaged; the last one may be cut off.
    """
    return list(rows_of(path))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file."""
    lines = path.read_text(errors='replace').splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            sound = isinstance(row['step'], int) and isinstance(row['sites'], dict)
        except (ValueError, LookupError, TypeError):
            sound = False
        if sound:
            yield row
        elif number < len(lines):
            raise DataError(f'{path}: line {number} is damaged; take it out')
