"""Files and locks: nothing half-written under a final name, one line for what cannot be written, one owner a folder."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_of_at_most
from filelock import FileLock
from safetensors.torch import save_file

from asr_downstream.engine.state import checkpoints
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import check_writable, whole_folder, write_atomically, write_together, writing
from asr_downstream.files.locks import check_free, occupied
from asr_downstream.files.weights import read_checkpoint

HOLD = """
import sys, time
from pathlib import Path
from asr_downstream.files.locks import occupied
with occupied(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


WRITERS = {
    'text': lambda path: path.write_text('x' * 40_000),
    'torch.save': lambda path: torch.save({'a': torch.zeros(40_000)}, path),
    'safetensors': lambda path: save_file({'a': torch.zeros(40_000)}, path),
}


@pytest.mark.parametrize('kind', WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / 'file'
    path.write_text('before')
    said = r'file: cannot be written \(.+\); 160 kB needed, .+B free: make room'
    with files_of_at_most(10_000), pytest.raises(AsrError, match=said) as caught:
        write_atomically(path, WRITERS[kind], needed=160_000)
    assert '\n' not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert path.read_text() == 'before'


def fill(out: Path, text: str, error: BaseException | None = None) -> None:
    with whole_folder(out) as aside:
        assert not list(aside.iterdir())
        (aside / text).write_text(text)
        if error is not None:
            raise error


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob('*') if path.is_file()}


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 'out'
    (tmp_path / '.out.old').mkdir()  # of a process that was killed between the renames
    for text in ('first', 'second'):
        fill(out, text)
        assert contents(tmp_path) == {f'out/{text}': text}
        assert [path.name for path in tmp_path.iterdir()] == ['out']
    errors = ((ValueError('no'), ValueError), (OSError('no'), AsrError), (KeyboardInterrupt(), KeyboardInterrupt))
    for error, raised in errors:
        with pytest.raises(raised):
            fill(out, 'third', error)
        assert contents(tmp_path) == {'out/second': 'second'}
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith('.tmp'):
            raise OSError('no')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(AsrError, match='out: cannot be written'):
        fill(out, 'third')
    assert contents(tmp_path) == {'out/second': 'second'}
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_space_that_is_needed_is_looked_for_first(tmp_path: Path) -> None:
    check_writable(tmp_path, 1000)
    with pytest.raises(AsrError, match=r'No space left on device\); 1,000.0 TB needed, .* free'):
        check_writable(tmp_path, 10**15)


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'held\n'
    return process


@pytest.mark.timeout(60)
def test_a_folder_has_one_owner_and_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(AsrError, match=rf'is in use by process {process.pid} on \S+ since'), occupied(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with occupied(tmp_path):
            assert json.loads((tmp_path / '.lock_owner.json').read_text())['process'] == os.getpid()
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / '.lock_owner.json').exists()


@pytest.mark.timeout(60)
def test_the_lock_of_a_process_that_is_gone_is_waited_for(tmp_path: Path) -> None:
    """Workers that outlive a killed process for seconds hold its lock."""
    code = HOLD.replace(
        "print('held', flush=True)", "import os; child = os.fork(); child and print('held', flush=True)"
    )
    code = code.replace('time.sleep(60)', 'time.sleep(60 if child else 2)')
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'held\n'
    process.kill()
    process.wait()
    start = time.monotonic()
    with occupied(tmp_path):
        assert time.monotonic() - start < 15


def test_memory_that_ends_is_not_a_full_disk(tmp_path: Path) -> None:
    for error in (torch.OutOfMemoryError('CUDA out of memory'), RuntimeError('NCCL error'), MemoryError()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / 'file'):
            raise error
        assert caught.value is error
    with pytest.raises(AsrError, match='cannot be written'), writing(tmp_path / 'file'):
        torch.save({}, tmp_path / 'missing/file')


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_is_not_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise error

    torch.save({'a': torch.zeros(1)}, tmp_path / 'a.pth')
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(CheckpointError, match='memory does not suffice') as caught:
        read_checkpoint(tmp_path / 'a.pth')
    assert 'damaged' not in str(caught.value)


def test_to_look_whether_a_folder_is_free_disturbs_nobody(tmp_path: Path) -> None:
    check_free(tmp_path)
    assert not list(tmp_path.iterdir())
    with occupied(tmp_path), pytest.raises(AsrError, match=rf'in use by process {os.getpid()} '):
        check_free(tmp_path)
    before = sorted(tmp_path.iterdir())
    check_free(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    lock = FileLock(tmp_path / '.lock', thread_local=False)
    lock.acquire()  # as one does that looks
    threading.Timer(0.1, lock.release).start()
    with occupied(tmp_path):
        pass


@pytest.mark.skipif(os.name == 'nt', reason='permissions of POSIX')
@pytest.mark.parametrize('way', ['file', 'together', 'folder', 'checkpoint'])
@pytest.mark.parametrize(('mask', 'mode'), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_is_written_has_the_permissions_of_new_files(tmp_path: Path, way: str, mask: int, mode: int) -> None:
    """safetensors makes files for their owner alone."""

    def save(path: Path) -> None:
        save_file({'a': torch.ones(2)}, path)

    before = os.umask(mask)
    try:
        path = tmp_path / 'out' / 'a.safetensors'
        if way == 'file':
            write_atomically(path, save)
        elif way == 'together':
            path.parent.mkdir()
            write_together({path: save})
        elif way == 'folder':
            with whole_folder(path.parent) as building:
                save(building / path.name)
        else:
            save(checkpoints.begin(tmp_path, 3) / path.name)
            path = checkpoints.complete(tmp_path, 3) / path.name
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
