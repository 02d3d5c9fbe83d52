"""Checkpoints whose files are not what a training wrote: said in one line, passed over where that is possible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine import run_of, seal
from safetensors.torch import load_file, save_file

from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, CheckpointError


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an average and checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    run_of(folder, use_ema=True)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / 'run')


# Manifest -------------------------------------------------------------------------------------------------------------

ENTRY = {'bytes': 1, 'sha256': '0' * 64}
MANIFESTS = {
    'null': {'files': None},
    'list': [],
    'no files': {'files': {}},
    'text': {'files': 'model.safetensors'},
    'entry': {'files': {'model.safetensors': None}},
    'empty entry': {'files': {'model.safetensors': {}}},
    'kinds': {'files': {'model.safetensors': {'bytes': '1', 'sha256': 1}}},
    'outside': {'files': {'../checkpoint-3/model.safetensors': ENTRY}},
    'absolute': {'files': {'/etc/passwd': ENTRY}},
    'number': 7,
}


@pytest.mark.parametrize(
    'content',
    [*MANIFESTS.values(), None, b'\xff\xfe{}', '[' * 100_000],
    ids=[*MANIFESTS, 'nothing', 'not utf-8', 'nested'],
)
def test_a_manifest_of_another_form_is_no_manifest(run: Path, content: Any) -> None:
    path = run / 'checkpoint-6/manifest.json'
    if isinstance(content, bytes | str):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        path.write_text(json.dumps(content))
    lines: list[str] = []
    assert checkpoints.find(run, report=lines.append) == run / 'checkpoint-3'
    assert len(lines) == 1
    assert 'manifest.json' in lines[0]
    assert 'skipped' in lines[0]


# Damage that the manifest does not show -------------------------------------------------------------------------------


def garble(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[: len(content) // 2] = b'\x80' * (len(content) // 2)
        (checkpoint / name).write_bytes(content)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-50])


def empty(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(b'')


def without(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def tensors(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        state = load_file(checkpoint / name)
        save_file({key: change(value) for key, value in state.items()}, checkpoint / name)

    return damage


def optimiser(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        state = torch.load(checkpoint / 'optimizer.bin', weights_only=True)
        torch.save(change(state) or state, checkpoint / 'optimizer.bin')

    return damage


def first_moment(value: Any) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        first = next(iter(state['state'].values()))
        first['exp_avg'] = value(first['exp_avg'])

    return optimiser(change)


def progress(**changes: Any) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / 'progress.json'
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v != 'gone'}))

    return damage


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path('bomb-went-off'),))


def bomb(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: torch.save({'state': Bomb()}, checkpoint / name)


def nan(value: torch.Tensor) -> torch.Tensor:
    return value * np.nan if value.is_floating_point() else value


STATES = 'random_states_0.pkl'
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f'garbled {n}': (garble(n), n) for n in ('model.safetensors', 'ema.safetensors', 'optimizer.bin', STATES)},
    **{f'cut {n}': (cut(n), n) for n in ('model.safetensors', 'ema.safetensors', 'optimizer.bin', STATES)},
    **{f'empty {n}': (empty(n), n) for n in ('model.safetensors', 'optimizer.bin', STATES, 'progress.json')},
    **{f'without {n}': (without(n), n) for n in ('model.safetensors', 'optimizer.bin', STATES, 'progress.json')},
    'bomb optimizer.bin': (bomb('optimizer.bin'), 'optimizer.bin'),
    'bomb random_states_0.pkl': (bomb(STATES), STATES),
    'NaN in the weights': (tensors('model.safetensors', nan), 'model.safetensors.*not finite'),
    'NaN in the average': (tensors('ema.safetensors', nan), 'ema.safetensors.*not finite'),
    'shapes of the average': (tensors('ema.safetensors', lambda v: v[:1].clone() if v.ndim else v), 'another shape'),
    'shapes of the optimiser': (first_moment(lambda v: v[:1].clone()), 'optimizer.bin'),
    'NaN in the optimiser': (first_moment(nan), 'optimizer.bin.*not finite'),
    'text in the optimiser': (first_moment(lambda v: 'hello'), 'optimizer.bin'),
    'list as optimiser': (optimiser(lambda state: [1]), 'optimizer.bin'),
    'groups of the optimiser': (optimiser(lambda state: {**state, 'param_groups': []}), 'optimizer.bin'),
    'progress without step': (progress(step='gone'), 'progress.json'),
    'progress of another step': (progress(step=2, scheduled=2, since=2), 'progress.json: is of step 2'),
    'negative step': (progress(step=-5), 'progress.json'),
    'step of text': (progress(step='6'), 'progress.json'),
    'true as step': (progress(step=True), 'progress.json'),
    'huge step': (progress(scheduled=10**30), 'progress.json'),
    'settings of null': (progress(settings=None), 'progress.json'),
    'bad of null': (progress(bad=None), 'progress.json'),
    'bad that is not there': (progress(bad=[10**9]), 'progress.json'),
    'window of text': (progress(window='x'), 'progress.json'),
    'window of other kinds': (progress(window=[{'losses': ['x'], 'others': {}, 'seconds': 1.0}]), 'progress.json'),
    'progress not utf-8': (lambda c: (c / 'progress.json').write_bytes(b'\xff\xfe') and None, 'progress.json'),
    'progress as a list': (lambda c: (c / 'progress.json').write_text('[1]') and None, 'progress.json'),
    'progress nested': (lambda c: (c / 'progress.json').write_text('[' * 10**5) and None, 'progress.json'),
}


# One of each kind is fast.
FAST = (
    'garbled optimizer.bin', 'cut model.safetensors', 'empty random_states_0.pkl', 'without progress.json',
    'bomb random_states_0.pkl', 'NaN in the average', 'shapes of the optimiser', 'list as optimiser', 'negative step',
    'bad that is not there', 'window of other kinds', 'progress not utf-8',
)  # fmt: skip


@pytest.mark.parametrize(
    'damage', [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in DAMAGES]
)
def test_damage_that_the_manifest_does_not_show(run: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    make, message = DAMAGES[damage]
    make(run / 'checkpoint-6')
    seal(run / 'checkpoint-6')
    with pytest.raises(CheckpointError, match=message) as caught:
        run_of(run, 'latest', use_ema=True, max_train_steps=8)
    assert 'checkpoint-6' in str(caught.value)
    assert not Path('bomb-went-off').exists()
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-3', 'checkpoint-6']
    assert len(read_log(run / 'log.jsonl')) == 6


def test_what_is_sealed_anew_is_a_checkpoint(run: Path) -> None:  # negative control
    seal(run / 'checkpoint-6')
    task, last = run_of(run, 'latest', use_ema=True, max_train_steps=8)
    assert (task.steps, last.name) == ([7, 8], 'checkpoint-8')


# Links and leftovers --------------------------------------------------------------------------------------------------


def test_a_link_to_a_checkpoint_is_removed_not_what_it_points_to(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / 'elsewhere'
    (run / 'checkpoint-3').rename(elsewhere)
    (run / 'checkpoint-3').symlink_to(elsewhere)
    run_of(run, 'latest', use_ema=True, max_train_steps=8, checkpoints_total_limit=2)
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-6', 'checkpoint-8']
    assert (elsewhere / 'model.safetensors').is_file()


def test_a_link_where_a_checkpoint_goes_is_replaced(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / 'elsewhere'
    (run / 'checkpoint-3').rename(elsewhere)
    (run / 'checkpoint-8').symlink_to(elsewhere)
    (run / '.checkpoint-8.tmp').symlink_to(tmp_path / 'nowhere')
    (elsewhere / 'manifest.json').unlink()
    _, last = run_of(run, 'latest', use_ema=True, max_train_steps=8)
    assert checkpoints.problem(last) is None
    assert not last.is_symlink()
    assert (elsewhere / 'model.safetensors').is_file()


def test_an_old_checkpoint_that_cannot_be_deleted_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rmtree = shutil.rmtree

    def denied(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == 'checkpoint-3':
            raise PermissionError(13, 'Permission denied', str(path))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, 'rmtree', denied)
    run_of(run, 'latest', use_ema=True, max_train_steps=8, checkpoints_total_limit=1)
    assert 'checkpoint-3: cannot be deleted (Permission denied)' in capsys.readouterr().out
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-3', 'checkpoint-8']


def test_what_a_killed_run_was_writing_is_removed_at_the_next_start(run: Path) -> None:
    leftovers = [checkpoints.begin(run, 7), checkpoints.begin(run, 100)]
    for folder in leftovers:
        (folder / 'model.safetensors').write_bytes(bytes(1000))
    (run / '.log.jsonl.tmp').write_text('x')
    (run / '.mine.tmp').write_text('x')
    run_of(run, 'latest', use_ema=True, max_train_steps=9)
    assert [p.name for p in run.iterdir() if p.name.endswith('.tmp')] == ['.mine.tmp']


# Log ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('line', [b'\xff\xfe\x00', b'[1]', b'null', b'{"step": "x"}', b'{"loss": 1}', b'[' * 100_000])
def test_a_damaged_log_is_set_aside_and_its_whole_lines_stay(
    run: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / 'log.jsonl').read_bytes().splitlines()
    damaged = b'\n'.join([*lines[:2], line, *lines[3:]]) + b'\n'
    (run / 'log.jsonl').write_bytes(damaged)
    assert [row['step'] for row in read_log(run / 'log.jsonl')] == [1, 2, 4, 5, 6]
    run_of(run, 'latest', use_ema=True, max_train_steps=8)
    assert [row['step'] for row in read_log(run / 'log.jsonl')] == [1, 2, 4, 5, 6, 7, 8]
    assert (run / 'damaged-log.jsonl').read_bytes() == damaged
    assert 'log.jsonl: line 3 cannot be read' in capsys.readouterr().out


def test_a_line_cut_short_by_a_kill_is_nothing_to_speak_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / 'log.jsonl'
    path.write_bytes(path.read_bytes() + b'{"step": 7, "lo\xc3')
    run_of(run, 'latest', use_ema=True, max_train_steps=8)
    assert [row['step'] for row in read_log(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not (run / 'damaged-log.jsonl').exists()
    assert 'cannot be read' not in capsys.readouterr().out


def test_a_log_that_is_a_folder_is_an_error(run: Path) -> None:
    (run / 'log.jsonl').unlink()
    (run / 'log.jsonl').mkdir()
    with pytest.raises(AsrError, match='log.jsonl: cannot be written'):
        run_of(run, 'latest', use_ema=True, max_train_steps=8)
