"""Checkpoints that need unpickling are refused as such, never as damaged files, and nothing in them runs."""

from __future__ import annotations

import builtins
import functools
import os
import pickle
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from asr_downstream.errors import CheckpointError
from asr_downstream.files.weights import read_checkpoint

pytestmark = pytest.mark.timeout(60)


class Call:
    """Calls ``function`` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


class Plain:
    """A class of the author's own."""


MARKER = 'was_here'
CONTENTS: dict[str, Any] = {
    'os.system': Call(os.system, f'touch {MARKER}'),
    'a function of a blocked module': os.system,
    'eval': Call(eval, f'open({MARKER!r}, "w")'),
    'exec': Call(exec, f'open({MARKER!r}, "w")'),
    'import': Call(builtins.__import__, 'antigravity'),
    'open': Call(open, MARKER, 'w'),
    'subprocess': Call(subprocess.check_call, ('touch', MARKER)),
    'getattr': Call(getattr, torch.Tensor, 'numpy'),
    'a pickle in a pickle': Call(pickle.loads, pickle.dumps(Call(open, MARKER, 'w'))),
    'partial': functools.partial(open, MARKER, 'w'),
    'a class of its own': Plain(),
    'a namespace': SimpleNamespace(a=1),
    'a whole module': nn.Linear(1, 1),
    'a path': Path('x'),
}


def zipped(content: Any, path: Path) -> None:
    torch.save({'state_dict': {'w': torch.ones(2)}, 'more': content}, path)


def legacy(content: Any, path: Path) -> None:
    torch.save({'state_dict': {'w': torch.ones(2)}, 'more': content}, path, _use_new_zipfile_serialization=False)


def pickled(protocol: int) -> Callable[[Any, Path], None]:
    return lambda content, path: path.write_bytes(pickle.dumps({'more': content}, protocol))


FORMS = {'zip': zipped, 'legacy': legacy} | {f'protocol {p}': pickled(p) for p in (0, 2, 4, 5)}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_what_would_run_code_is_refused_as_that(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    called_damaged = []
    for name, content in CONTENTS.items():
        path = tmp_path / 'a.pth'
        FORMS[form](content, path)
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(path)
        if not str(error.value).startswith(f'{path}: holds more than weights') or '\n' in str(error.value):
            called_damaged.append(name)
    assert not called_damaged
    assert not Path(MARKER).exists(), 'something was run'


def test_cut_pickles_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    for save in (legacy, pickled(2)):
        save(CONTENTS['os.system'], path)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r'a\.pth: (is damaged|holds more)'):
            read_checkpoint(path)
    pickled(2)({'only': 'strings'}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_flipped_bytes_end_in_one_line(tmp_path: Path) -> None:
    """Whatever the reader trips over: a mutated file is read, or refused by its name."""
    draw = random.Random(0)
    path = tmp_path / 'a.pth'
    said = []
    for form in ('zip', 'legacy', 'protocol 2', 'protocol 4'):
        FORMS[form]({'meta': {'epoch': 1, 'name': 'x'}, 'none': None}, path)
        whole = path.read_bytes()
        for _ in range(60):
            mutated = bytearray(whole)
            for _ in range(draw.choice((1, 4, 16))):
                mutated[draw.randrange(len(mutated))] = draw.randrange(256)
            path.write_bytes(mutated)
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                said.append(str(error))
    assert all(text.startswith(f'{path}: ') and '\n' not in text for text in said)
    assert 0 < len(said) < 240, 'some are read, some are not'
