"""Building the operator: its key, its place, its failures; a killed build leaves nothing that is in the way."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from asr_downstream.errors import AsrError
from asr_downstream.far.model.ops import build
from asr_downstream.far.model.ops.lstm import operator
from asr_downstream.files.cache import cache_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('ASR_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that takes no time; the list has where it worked."""
    calls: list[Path] = []

    def run(aside: Path, kind: str) -> None:
        calls.append(aside)
        (aside / 'lstm.so').write_text(kind)

    monkeypatch.setattr(build, 'run_compiler', run)
    return calls


def script(path: Path, body: str) -> Path:
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'asr_downstream', 'build-ops', *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **env}, check=False,
    )  # fmt: skip


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv('ASR_CACHE', raising=False)
    assert cache_folder() == Path.home() / '.cache' / 'asr-downstream'
    monkeypatch.setenv('ASR_CACHE', '~/elsewhere')
    assert cache_folder() == Path.home() / 'elsewhere'
    monkeypatch.setenv('ASR_CACHE', str(tmp_path))
    assert cache_folder() == tmp_path


def test_it_is_built_once_for_each_compiler(
    cache: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build.built() is None
    first = build.build()
    assert first == build.build() == build.built()
    assert first.is_relative_to(cache)
    assert first.stat().st_mode & 0o777 == 0o755 or first.is_file()
    assert len(made) == 1
    assert build.build(again=True) == first
    assert len(made) == 2
    monkeypatch.setenv('CXX', str(script(tmp_path / 'other', 'echo clang 99')))
    second = build.build()
    assert second != first
    assert second.read_text() == 'clang'
    os.utime(first, (1, 1))
    assert build.built() == second
    assert not [path for path in made if path.exists()]


@pytest.mark.parametrize('what', ['torch', 'python', 'processor', 'source'])
def test_another_environment_has_another_library(
    what: str, made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build.here.cache_clear()
    first = build.build()
    other = tmp_path / 'lstm.cpp'
    other.write_text('// another')
    if what == 'torch':
        monkeypatch.setattr(torch, '__version__', '99.0')
    elif what == 'python':
        monkeypatch.setattr(sys.implementation, 'cache_tag', 'cpython-999')
    elif what == 'processor':
        monkeypatch.setattr(build, 'processor', lambda: 'fma avx1024')
    else:
        monkeypatch.setattr(build.program, 'SOURCES', (other, *build.program.SOURCES[1:]))
    build.here.cache_clear()
    try:
        assert build.built() is None
        assert build.build().parent != first.parent
    finally:
        monkeypatch.undo()
        build.here.cache_clear()


@pytest.mark.slow
def test_a_failure_leaves_nothing_that_would_be_loaded(cache: Path, tmp_path: Path) -> None:
    body = 'case "$*" in *version*) echo stub 1;; *) echo "fatal: no such header"; exit 1;; esac'
    done = command(CXX=str(script(tmp_path / 'stub', body)))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'the operator does not compile here (fatal: no such header;' in done.stderr
    assert build.built() is None
    assert {path.name for path in build.folder().iterdir()} == {'.lock', 'failed.log'}
    assert 'no such header' in (build.folder() / 'failed.log').read_text()


@pytest.mark.slow
def test_a_killed_build_is_not_in_the_way(cache: Path, tmp_path: Path) -> None:
    compiles = tmp_path / 'compiles'
    body = f'case "$*" in *version*) echo stub 1;; *) touch {compiles}; sleep 100;; esac'
    slow = script(tmp_path / 'stub', body)
    process = subprocess.Popen(
        [sys.executable, '-m', 'asr_downstream', 'build-ops'],
        cwd=ROOT, env={**os.environ, 'CXX': str(slow)}, start_new_session=True,
    )  # fmt: skip
    try:
        while not compiles.exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert list(build.folder().glob('.*.tmp'))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert build.built() is None
    script(slow, 'case "$*" in *version*) echo stub 1;; *) exit 7;; esac')
    start = time.monotonic()
    done = command(CXX=str(slow))
    assert 'does not compile here' in done.stderr  # it came as far as the compiler
    assert time.monotonic() - start < 100
    assert not list(build.folder().glob('.*.tmp'))


def test_two_at_once_build_once(cache: Path, tmp_path: Path) -> None:
    from asr_downstream.files.locks import occupied

    build.folder().mkdir(parents=True)
    code = (
        'from pathlib import Path; from asr_downstream.far.model.ops import build\n'
        'def run(aside, kind): (aside / "lstm.so").write_text(kind)\n'
        'build.run_compiler = run; print(flush=True); print(build.build())'
    )
    with occupied(build.folder()):
        other = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        other.stdout.readline()  # from here on it builds, or waits
        time.sleep(2)
        assert other.poll() is None
        assert build.built() is None
    out, _ = other.communicate(timeout=120)
    assert Path(out.strip()) == build.built()


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_models_run(cache: Path) -> None:
    for env in ({'PATH': '', 'CXX': ''}, {'CXX': 'no-such-compiler'}):
        done = command(**env)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert 'no C++ compiler' in done.stderr
        assert 'Debian: apt-get install g++' in done.stderr
    code = (
        'import torch; from asr_downstream.far import MultiHeadLSTM\n'
        'from asr_downstream.far.model.backends import rules\n'
        'with torch.no_grad(): print(MultiHeadLSTM(8, 2)(torch.randn(1, 3, 8)).shape, rules()["cpu"])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'PATH': ''},
        check=False,
    )
    assert done.stdout.startswith('torch.Size([1, 3, 8])'), done.stderr
    assert 'asr-downstream build-ops' in done.stdout


def test_a_compiler_that_does_not_run_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CXX', str(script(tmp_path / 'broken', 'exit 3')))
    with pytest.raises(AsrError, match='is no compiler that runs'):
        build.build()


def test_a_damaged_library_is_not_loaded(cache: Path, made: list[Path]) -> None:
    build.build().write_bytes(b'\x7fELF half')
    operator.cache_clear()
    try:
        assert not operator().there
        assert 'cannot be loaded' in operator().reason
        assert 'build-ops --again' in operator().reason
    finally:
        operator.cache_clear()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('ASR_CACHE', str(tmp_path / 'file'))
    with pytest.raises(AsrError, match='cannot be written'):
        build.build()


@pytest.mark.slow
def test_the_real_compiler(cache: Path) -> None:
    done = command()
    assert done.returncode == 0, done.stderr
    assert str(cache) in done.stdout
    code = 'from asr_downstream.far.model.ops.lstm import operator; print(operator())'
    found = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "Operator(there=True, reason='')", found.stderr
