"""Runs as analyses see them: a model, its data, how it is run and measured. Adapters say how theirs are opened.

    @RUNS.register_module('detection')
    def open_run(path: Path, wanted: Wanted) -> OpenRun: ...

`asr_downstream.registry.RUNS` names the module of each kind; `MARKS` tells by its files which kind a folder is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from asr_downstream.errors import AsrError, CheckpointError, did_you_mean
from asr_downstream.folding.analysis.attacks import Attack
from asr_downstream.folding.analysis.stripes import Metric
from asr_downstream.folding.passes import Step, default_step
from asr_downstream.registry import RUNS, find

__all__ = ['Change', 'OpenRun', 'Wanted', 'kind_of', 'names_of', 'open_run']

# Maps images ``(B, C, H, W)`` to others of that shape; black and white as numbers or tensors that broadcast with them.
Change: TypeAlias = Callable[[Tensor, Any, Any], Tensor]


@dataclass(frozen=True)
class Wanted:
    """What an analysis wants of a run.

    Attributes:
        images: number of images to look at.
        data: where they are, instead of what the run says.
        config: of the training, where none lies beside the weights.
        ema: whether to take the average of the weights; None: if there is one.
        trust: whether to read what needs unpickling.
    """

    images: int = 256
    data: Path | None = None
    config: Path | None = None
    ema: bool | None = None
    trust: bool = False


@dataclass
class OpenRun:
    """A trained model, and what an analysis needs to run and to measure it.

    Attributes:
        name: of the run.
        kind: name in `asr_downstream.registry.RUNS`.
        model: in eval mode, plugged as it was trained, on its device.
        data: gives batches of the images wanted, read anew each time.
        step: runs the model on a batch; gives tensors.
        metric: of a model of this run, on the images that it is judged by; None: there is none.
        by: of a batch, a number for each of its images to group gates by; None: nothing.
        grouped: what ``by`` gives, such as ``'timestep'``.
        changed: ``changed(model, change)``: inside the block, images go through a change before the model sees them;
            None: the model takes no images.
        attack: ``attack(model, attack) -> metric``: the metric on images that an attack of
            `asr_downstream.folding.analysis.attacks` has changed; None: there is no loss to attack.
        folder: of the training, where ``gates.jsonl`` may be; None: there is none.
        facts: where the weights come from, for the report.
    """

    name: str
    kind: str
    model: nn.Module
    data: Callable[[], Iterable[Any]]
    step: Step = default_step
    metric: Metric | None = None
    by: Callable[[Any], Tensor] | None = None
    grouped: str = ''
    changed: Callable[[nn.Module, Change], AbstractContextManager[None]] | None = None
    attack: Callable[[nn.Module, Attack], float] | None = None
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# Kind -> a file in the folder of a run, and what a line of it begins with. The first that fits counts.
MARKS = (
    ('far', 'shipped/*/far.json', ''),
    ('diffusion', 'config.py', r'noise_scheduler\b'),
    ('classification', 'config.py', ''),
    ('detection', '*.pth', ''),
)
WEIGHTS = ('.pth', '.safetensors')


def kind_of(path: Path) -> str:
    """Tell which kind of run a folder, a checkpoint in it, or a file of weights belongs to.

    Raises:
        CheckpointError: none.
    """
    if path.is_file() and path.suffix in WEIGHTS:
        return 'detection'
    for folder in (path, path.parent) if path.is_dir() else ():
        for kind, pattern, line in MARKS:
            if any(re.search(f'^{line}', text_of(file, line), re.MULTILINE) for file in folder.glob(pattern)):
                return kind
    raise CheckpointError(
        f'{path}: is no run that is known; give the folder of a training, a checkpoint in it, or for a detector a file '
        f'of weights'
    )


def text_of(path: Path, line: str) -> str:
    """Text of a file that is looked into."""
    return path.read_text(errors='replace') if line else ''


def open_run(path: Path, wanted: Wanted, kind: str | None = None) -> OpenRun:
    """Open a run by its adapter.

    Args:
        path: folder of the run, a checkpoint in it, or a file of weights.
        wanted: images and options.
        kind: of run; default: what the files say.

    Raises:
        AsrError: it is no run, the extra of its kind is not installed, or it cannot be opened.
    """
    if not path.exists():
        raise CheckpointError(f'{path}: no such run')
    kind = kind or kind_of(path)
    known = {*RUNS.modules, *RUNS.module_dict}
    if kind not in known:
        raise AsrError(f'{path}: no runs of kind {kind!r} are known; {did_you_mean(kind, known)}')
    return find(RUNS, kind)(path, wanted)


def names_of(given: Iterable[str]) -> dict[str, Path]:
    """Name runs: ``NAME=PATH``, or a path alone is called by its folder, or by more of the path if others are too.

    Raises:
        AsrError: a name or a run is given twice.
    """
    named: list[tuple[str, Path]] = []
    for text in given:
        name, equals, rest = text.partition('=')
        alone = not equals or not name or not rest or Path(text).exists()
        named.append(('', Path(text)) if alone else (name, Path(rest)))
    paths = [path.resolve() for _, path in named]
    if len(set(paths)) < len(paths):
        raise AsrError('a run is given twice')
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    found = {name or '/'.join(full.parts[-depth:]): path for (name, path), full in zip(named, paths, strict=True)}
    if len(found) < len(paths):
        raise AsrError('two runs have one name; give each a name of its own, NAME=RUN')
    return found
