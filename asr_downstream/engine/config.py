"""Training configs: MMEngine Config files whose keys and defaults are those of a `Schema`."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.config import Config

from asr_downstream.engine import defaults
from asr_downstream.engine.values import check_values
from asr_downstream.errors import AsrError, DataError, did_you_mean
from asr_downstream.files.atomic import cannot_write, write_atomically
from asr_downstream.files.configs import import_modules, override, plain, read_config, without_templates

__all__ = ['CONFIG_FILE', 'EPOCHS', 'Schema', 'point_at_data', 'portable', 'with_epochs', 'write_config']

CONFIG_FILE = 'config.py'  # of a run: the config with all defaults
# Keys in epochs, where a kind of config has them -> those in optimiser steps, in the place of which they stand.
EPOCHS = {'epochs': 'max_train_steps', 'warmup_epochs': 'lr_warmup_steps', 'validation_epochs': 'validation_steps'}


@dataclass(frozen=True)
class Schema:
    """Keys, defaults and ranges of one kind of config. The keys of every training are part of them.

    Attributes:
        name: of the kind, for messages.
        folder: with ready configs, for messages.
        own: module whose annotated names are further keys with their defaults, or other defaults of known ones. An
            annotation is the kind of a value and its range, see `asr_downstream.engine.values`.
        required: keys without a default, with an example.
    """

    name: str
    folder: str
    own: ModuleType
    required: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Any]:
        """Every key and what its value may be, as an annotation that pydantic checks."""
        own = inspect.get_annotations(self.own, eval_str=True)
        return {**own, **inspect.get_annotations(defaults, eval_str=True), **own}  # its own ones come first

    @property
    def defaults(self) -> dict[str, Any]:
        """Every key and its default."""
        return {key: copy.deepcopy(getattr(self.own, key, getattr(defaults, key, None))) for key in self.kinds}

    def load(
        self,
        path: Path,
        options: dict[str, Any] | None = None,
        data: Path | None = None,
        instead: Mapping[str, Any] | None = None,
    ) -> Config:
        """Read a config, fill in the defaults and check it.

        Args:
            path: config file.
            options: overrides, ``{'learning_rate': 1e-3, 'model.layers_per_block': 1}``.
            data: image folder or zip, instead of the one in the config. Without it, a relative ``data.path`` that does
                not exist is looked up under the environment variable ``ASR_DATA_ROOT``, if that is set.
            instead: whole keys in the place of those in the file; options change them.

        Raises:
            AsrError: the file is missing or no config, or has keys or values that are not known.
            DataError: ``data`` does not exist.
        """
        path = Path(path)
        given = dict(read_config(path, self.folder, imports=False).items()) | dict(instead or {})
        return self.complete(Config(self.defaults, filename=str(path)), given, path, options, data)

    def from_dict(
        self,
        content: Mapping[str, Any],
        name: str,
        options: dict[str, Any] | None = None,
        data: Path | None = None,
    ) -> Config:
        """Make a config from a dict, as `load` does from a file; ``name`` stands for the name of the file."""
        config = Config(self.defaults, cfg_text='# made in code', filename=name)
        return self.complete(config, content, Path(name), options, data)

    def complete(
        self,
        config: Config,
        given: Mapping[str, Any],
        path: Path,
        options: dict[str, Any] | None,
        data: Path | None,
    ) -> Config:
        """Put what was given into the defaults, and check it all."""
        for key, value in given.items():
            self.check_known(key, path)
            config[key] = copy.deepcopy(value)  # a dict replaces the default dict: its keys belong to its type
        for key in options or {}:
            self.check_known(key.partition('.')[0], Path('--cfg-options'))
        override(config, options, path)
        self.check(config, path)
        import_modules(config.custom_imports, path)
        point_at_data(config.data, data)
        return config

    def check_known(self, key: str, where: Path) -> None:
        """Refuse a key that is not in the defaults."""
        if key not in self.kinds:
            raise AsrError(f'{where}: {key!r} is not a key of a {self.name} config; {did_you_mean(key, self.kinds)}')

    def check(self, config: Config, path: Path) -> None:
        """Refuse values of the wrong kind or out of range, before anything is built; the config stays MMEngine's."""
        kinds, values = self.kinds, plain(config.to_dict())
        check_values(kinds, {key: values[key] for key in kinds}, str(path))
        for key, example in {**self.required, 'max_train_steps': '10_000'}.items():
            if config[key] is None:
                raise AsrError(f'{path}: has no {key!r}; add {key} = {example}')


def point_at_data(spec: Any, data: Path | None = None) -> None:
    """Find the ``path`` of a ``data`` of a config, in place; see `Schema.load`.

    Raises:
        AsrError: its path is no text.
        DataError: ``data`` does not exist.
    """
    if not isinstance(spec.get('path'), str | None):
        raise AsrError(f'data: path={spec["path"]!r} should be a text')
    shared = os.environ.get('ASR_DATA_ROOT')
    if data is not None:
        if not data.exists():
            raise DataError(f'{data}: no such image folder or zip file; check --data')
        spec['path'] = str(data)
    elif shared and spec.get('path') and not Path(spec['path']).exists():
        candidate = Path(shared) / Path(spec['path']).name
        if candidate.exists():
            spec['path'] = str(candidate)
    path = Path(spec.get('path') or '')
    if spec.get('type') in ('Digits', 'Zip', 'ImageFolder') and spec.get('path') and path.exists():
        spec['type'] = 'Zip' if path.is_file() else 'ImageFolder'  # either will do


def with_epochs(config: Config, samples: int, world: int) -> Config:
    """Copy a config with its epochs turned into optimiser steps.

    Args:
        config: of a training.
        samples: number of training images.
        world: number of processes.
    """
    config = copy.deepcopy(config)
    a_step = config.train_batch_size * config.gradient_accumulation_steps * world
    for epochs, steps in EPOCHS.items():
        if config.get(epochs) is not None:
            config[steps] = max(1, math.ceil(config[epochs] * samples / a_step))
            config[epochs] = None
    return config


def portable(config: Config, **changes: Any) -> str:
    """Text of a resolved config with some keys changed, and without the folder, which may be moved.

    Raises:
        AsrError: it has a value that cannot be written as Python.
    """
    content = {**config.to_dict(), 'output_dir': None, **changes}
    try:
        return f'# Resolved config of a run.\n{without_templates(Config(written(content)).pretty_text)}'
    except Exception as error:  # of yapf, which formats it
        raise AsrError(f'{CONFIG_FILE}: would hold values that cannot be read again ({error})') from error


def written(value: Any) -> Any:
    """Copy a config with numbers that Python has no literal for as it would have to write them."""
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(written(item) for item in value)
    return NotFinite(value) if isinstance(value, float) and not math.isfinite(value) else value


class NotFinite(float):
    """Infinity or NaN, which is written as ``float('inf')``: a bare ``inf`` is a name that is not defined."""

    def __repr__(self) -> str:
        return f"float('{float(self)}')"

    __str__ = __repr__


def write_config(path: Path, text: str) -> None:
    """Write the text of `portable`, if it will be read as the same config again.

    Raises:
        AsrError: it would not, or cannot be written.
    """
    try:
        same = portable(Config.fromstring(text, '.py')) == text
    except OSError as error:  # it is read from a temporary file
        raise cannot_write(path, error) from error
    except Exception as error:
        raise AsrError(f'{path}: would hold what cannot be read again ({error}); change that key') from error
    if not same:
        raise AsrError(f'{path}: would be read again as another config; are there {{{{ }}}} in its paths or texts?')
    write_atomically(path, lambda p: p.write_text(text))
