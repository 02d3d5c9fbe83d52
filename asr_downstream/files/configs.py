"""Config files: MMEngine's, read with errors that say which file and which override.

A ``.py`` config is a program and runs when it is read. ``.yaml`` and ``.json`` ones are data: MMEngine's own handler
lets a YAML file construct any Python object, so importing this module replaces it by one that does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.fileio import YamlHandler, register_handler

from asr_downstream.errors import AsrError, did_you_mean

__all__ = ['check_arguments', 'override', 'plain', 'read_config', 'without_templates']

# libyaml's is 20 times as fast: MMDetection's index of models takes 0.1 s or 2 s.
SafeLoader: Any = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)


class Loader(SafeLoader):
    """A safe loader that knows one tag more: tuples, as MMEngine writes those of configs."""


Loader.add_constructor('tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node)))


@register_handler(['yaml', 'yml'])
class SafeYamlHandler(YamlHandler):
    """Reads YAML as data: mappings, lists, tuples, texts and numbers; any other tag of Python is an error.

    It writes as MMEngine's own does.
    """

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Read an open file."""
        return yaml.load(file, Loader)


def read_config(path: Path, where: str) -> Config:
    """Read a config file.

    Args:
        path: the file.
        where: folder with ready ones, for the message.

    Raises:
        AsrError: it is missing or is no config.
    """
    if not path.is_file():
        raise AsrError(f'{path}: no such config; configs are in {where}')
    try:
        return Config.fromfile(path)
    except Exception as error:
        raise AsrError(f'{path}: is not a config that can be read ({type(error).__name__}: {error})') from error


def override(config: Config, options: dict[str, Any] | None, path: Path) -> None:
    """Apply ``--cfg-options``, ``{'optimizer.lr': 0.01}``, in place.

    Raises:
        AsrError: they do not fit.
    """
    try:
        config.merge_from_dict(options or {})
    except Exception as error:
        raise AsrError(f'--cfg-options {options}: do not fit {path} ({type(error).__name__}: {error})') from error


def without_templates(text: str) -> str:
    """Text of a config in which MMEngine finds no ``{{ template }}``: names and paths that hold one stay as they are.

    In Python text, two braces can only follow each other inside of a string.
    """
    return text.replace('{{', '{\\x7b')


def check_arguments(cls: type, arguments: dict[str, Any], what: str, given: Collection[str] = ()) -> None:
    """Refuse arguments that a class does not take, or that it needs and does not get.

    Args:
        cls: the class.
        arguments: of the config.
        what: where they are, for the message, such as ``'data: Zip'``.
        given: names of the arguments that do not come from the config.

    Raises:
        AsrError: see above.
    """
    takes = {name: p for name, p in inspect.signature(cls).parameters.items() if name not in given}
    named = {name for name, p in takes.items() if p.kind is not p.VAR_KEYWORD}
    if len(named) == len(takes):
        for key in arguments:
            if key not in named:
                known = did_you_mean(key, named) if named else 'it takes none'
                raise AsrError(f'{what} takes no {key!r}; {known}')
    for name in sorted(named - arguments.keys()):
        if takes[name].default is inspect.Parameter.empty:
            raise AsrError(f'{what} needs {name!r}; add {name}=...')


def plain(value: Any) -> Any:
    """Copy a config into plain dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
