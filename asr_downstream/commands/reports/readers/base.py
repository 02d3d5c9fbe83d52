"""What readers share: which folders they know, and the provenance and the curves of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from asr_downstream.commands.reports.data import literals, numbers, rows_of, text_of, thinned, value_in
from asr_downstream.commands.reports.page import Chart, Curve, Picture, Section, unique
from asr_downstream.files.folders import configs_in

__all__ = ['Reader', 'config_facts', 'loss_of', 'names_of', 'pictures_in', 'training_chart', 'version_facts']

SUFFIXES = ('.png', '.jpg', '.jpeg')
MOST_PICTURES = 6
# What configs say about a training -> how the page calls it.
CONFIG_FACTS = {
    'seed': 'seed',
    'randomness.seed': 'seed',
    'max_train_steps': 'steps',
    'max_epochs': 'epochs',
    'train_cfg.max_epochs': 'epochs',
    'epochs': 'epochs',
    'train_batch_size': 'batch',
    'train_dataloader.batch_size': 'batch',
    'learning_rate': 'learning rate',
    'optim_wrapper.optimizer': 'optimiser',
    'data': 'data',
    'data_root': 'data',
    'plug': 'plug',
    'model.backbone.plug': 'plug',
}


class Reader:
    """Reads folders of one kind.

    Attributes:
        together: whether all folders of this kind are one section.
        whole: whether what is below such a folder belongs to it.
    """

    together: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def matches(self, folder: Path) -> bool:
        """Whether a folder is of this kind."""
        raise NotImplementedError

    def read(self, folders: Sequence[Path]) -> Section:
        """Make a section; of one folder, unless they belong together."""
        raise NotImplementedError


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder."""
    return unique([folder.resolve().name for folder in folders])


def loss_of(folder: Path) -> list[tuple[float, float]]:
    """Loss by step of a run of any kind, from the logs that it has."""
    rows = list(rows_of(folder / 'log.jsonl'))
    if rows:
        return thinned(numbers(rows, 'step', 'loss'))
    rows = [row for log in sorted(folder.glob('*/vis_data/scalars.json')) for row in rows_of(log)]
    return thinned(numbers(rows, 'iter', 'loss'))


def training_chart(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Chart]:
    """The loss of runs, if they have logs."""
    named = zip(names or names_of(folders), folders, strict=True)
    curves = [Curve(name, points) for name, folder in named if (points := loss_of(folder))]
    note = 'Means of neighbouring lines of the logs.'
    return [Chart('Training loss', 'step', 'loss', curves, log=True, note=note)] if curves else []


def pictures_in(folder: Path) -> list[Path]:
    """Pictures in a folder."""
    return sorted(path for path in folder.glob('*') if path.suffix.lower() in SUFFIXES and path.is_file())


def pictures_of(folder: Path, name: str, *places: str, most: int | None = MOST_PICTURES) -> list[Picture]:
    """Pictures in folders of a run, the first of them; None: all."""
    paths = [path for place in places for path in pictures_in(folder / place)]
    return [Picture(path, f'{name}: {path.relative_to(folder).as_posix()}') for path in paths[:most]]


def config_facts(folder: Path) -> list[tuple[str, str]]:
    """What the config in a run says about the training."""
    found: dict[str, str] = {}
    for path in configs_in(folder)[:1]:
        config = literals(path)
        for key, label in CONFIG_FACTS.items():
            value = value_in(config, key)
            if value is not None and label not in found:
                found[label] = value if isinstance(value, str) else text_of(value)
        found['config'] = path.name
    return list(found.items())


def version_facts(versions: Any) -> list[tuple[str, str]]:
    """Versions and machine."""
    return [('versions', text_of(versions))] if isinstance(versions, dict) and versions else []
