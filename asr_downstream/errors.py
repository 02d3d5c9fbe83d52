"""Errors of the suite: each message says what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    'AsrError',
    'CheckpointError',
    'CompleteError',
    'DataError',
    'FoldError',
    'OtherProcessError',
    'PlugError',
    'add_note',
    'check_installed',
    'did_you_mean',
    'notes',
    'warn',
]


class AsrError(ValueError):
    """Base class. The command line tools print it as one line and exit with 1."""


class PlugError(AsrError):
    """A spec that cannot be plugged into this model. The model has not been touched."""


class FoldError(AsrError):
    """A model that cannot be folded exactly. The model has not been touched."""


class CheckpointError(AsrError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class DataError(AsrError):
    """A data set or image that is missing or not in the format it should have."""


class CompleteError(AsrError):
    """A training that is to go on and has all its steps: the training tool says so, and is done.

    Args:
        message: for a person.
        checkpoint: the last one.
    """

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class OtherProcessError(AsrError):
    """Another process of the launch has failed, and says why; this one only ends."""


def add_note(error: BaseException, text: str) -> None:
    """Add a line to an error, as ``BaseException.add_note`` of Python 3.11 does: tracebacks show it there."""
    error.__notes__ = [*notes(error), text]


def notes(error: BaseException) -> list[str]:
    """Lines that were added to an error."""
    return list(getattr(error, '__notes__', ()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'did you mean X? Known: ...'`` for a misspelt ``name``."""
    known = sorted(known)
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    hint = f'did you mean {by_lower[close[0]]!r}? ' if close else ''
    return f'{hint}Known: {", ".join(known)}'


def warn(message: str) -> None:
    """Warn, with the file and line of the nearest caller outside of this package and of torch's decorators."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals['__name__'].partition('.')[0] in ('asr_downstream', 'torch'):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_installed(packages: Iterable[str], needs: str, install: str) -> None:
    """Refuse to go on without the packages of an extra; finds them and imports none.

    Args:
        packages: names of their modules.
        needs: the start of the message, ``'detection needs the extra det'``.
        install: command that installs them.

    Raises:
        AsrError: one is missing.
    """
    for package in packages:
        try:
            missing = '' if importlib.util.find_spec(package) else f'No module named {package!r}'
        except ImportError as error:
            missing = str(error)
        if missing:
            raise AsrError(f'{needs} ({missing}); install it with: {install}')
