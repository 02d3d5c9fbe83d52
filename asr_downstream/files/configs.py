"""Config files: MMEngine's, read with errors that say which file and which override.

A ``.py`` config is a program and runs when it is read. ``.yaml`` and ``.json`` ones are data, which imports nothing:
MMEngine's own handler lets a YAML file construct any Python object, so importing this module replaces it by one that
does not.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.fileio import YamlHandler, register_handler

from asr_downstream.errors import AsrError

__all__ = ['import_modules', 'override', 'plain', 'read_config', 'without_templates', 'work_dir_of']

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


def read_config(path: Path, where: str, imports: bool = True) -> Config:
    """Read a config file.

    Args:
        path: the file.
        where: folder with ready ones, for the message.
        imports: whether to import what its ``custom_imports`` name; see `import_modules`.

    Raises:
        AsrError: it is missing or is no config, or it is data that asks for imports.
    """
    if not path.is_file():
        raise AsrError(f'{path}: no such config; configs are in {where}')
    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:
        raise AsrError(f'{path}: is not a config that can be read ({type(error).__name__}: {error})') from error
    named = config.get('custom_imports')
    if named and path.suffix != '.py':
        raise AsrError(f'{path}: custom_imports: a {path.suffix} config is data and imports nothing; use a .py config')
    if imports:
        import_modules(named, path)
    return config


def import_modules(named: Any, path: Path) -> None:
    """Import what ``custom_imports = dict(imports=['mypackage.data'], allow_failed_imports=False)`` names.

    Args:
        named: the dict; None or empty: nothing.
        path: config, for the message.

    Raises:
        AsrError: it is no such dict, or a module cannot be imported and ``allow_failed_imports`` is not set.
    """
    if not named:
        return
    named = plain(named)
    if not isinstance(named, dict) or not {'imports'} <= named.keys() <= {'imports', 'allow_failed_imports'}:
        raise AsrError(f"{path}: custom_imports={named!r} should be dict(imports=['mypackage.data'])")
    modules = [named['imports']] if isinstance(named['imports'], str) else named['imports'] or []
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise AsrError(f"{path}: custom_imports: imports={modules!r} should be a list of modules, ['mypackage.data']")
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if named.get('allow_failed_imports'):
                warnings.warn(f'{path}: custom_imports: {name} is not imported ({error})', stacklevel=2)
                continue
            raise AsrError(
                f'{path}: custom_imports: {name} cannot be imported ({error}); install its package here, or add the '
                f'folder that it is in to PYTHONPATH'
            ) from error
        except Exception as error:
            said = f'{type(error).__name__}: {error}'
            raise AsrError(f'{path}: custom_imports: {name} fails while it is imported ({said})') from error


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


def work_dir_of(config: Config, under: str = '') -> Path:
    """Folder of the run that a config describes.

    Args:
        config: with ``output_dir``, or MMEngine's ``work_dir``, if it says where.
        under: folder in ``work_dirs`` for one kind of run.

    Returns:
        As the config says, or ``work_dirs/<under>/<config name>``.
    """
    said = config.get('output_dir') or config.get('work_dir')
    return Path(said or Path('work_dirs', under, Path(config.filename).stem))


def plain(value: Any) -> Any:
    """Copy a config into plain dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
