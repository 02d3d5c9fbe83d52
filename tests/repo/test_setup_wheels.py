"""The set-up: wheels of mmcv that are built, kept and taken, with a pip and a torch that take no time."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from environment import mmcv
from environment.display import Display
from environment.ninja import command_of
from environment.steps import Setup, Step, StepFailed, pin

PIP = """
import io, json, os, pathlib, sys, tarfile, zipfile
args = sys.argv[1:]
here = pathlib.Path(os.environ['FAKE'])
with open(here / 'calls', 'a') as file:
    file.write(' '.join(args) + '\\n')
plan = json.loads((here / 'plan').read_text())
def wheel(folder, ops):
    os.makedirs(folder, exist_ok=True)
    with zipfile.ZipFile(f'{folder}/NAME-cp311-cp311-linux_x86_64.whl', 'w') as file:
        file.writestr('mmcv/__init__.py', '')
        if ops is not None:
            file.writestr('mmcv/_ext.py', ops)
if 'download' in args:
    folder = args[args.index('--dest') + 1]
    if plan['ready'] is not None and '--prefer-binary' in args:
        wheel(folder, plan['ready'])
    else:
        os.makedirs(folder)
        with tarfile.open(f'{folder}/NAME.tar.gz', 'w:gz') as file:
            info = tarfile.TarInfo('NAME/setup.py')
            info.size = 4
            file.addfile(info, io.BytesIO(b'pass'))
else:
    assert os.path.isfile(args[-1] + '/setup.py')
    print(sorted(os.listdir(args[-1])))
    print('[1/2] c++', os.environ['CFLAGS'], os.environ['MAX_JOBS'])
    wheel(args[args.index('--wheel-dir') + 1], plan['compiled'])
"""


class Wheels:
    """Environments with a cache, a pip that writes down its calls, and a torch."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, io.StringIO()
        name = pin('onedl-mmcv').replace('-', '_').replace('==', '-')
        self.name = f'{name}-cp311-cp311-linux_x86_64.whl'
        fake = folder / 'fake'
        (fake / 'pip').mkdir(parents=True)
        (fake / 'pip/__init__.py').write_text('')
        (fake / 'pip/__main__.py').write_text(PIP.replace('NAME', name))
        self.torch('9.9')
        self.plan(ready=None, compiled='')
        patch.setenv('ASR_CACHE', str(folder / 'cache'))
        patch.setenv('FAKE', str(fake))
        patch.setattr(mmcv, 'ROOT', folder)

    def torch(self, version: str) -> None:
        """Install a torch."""
        text = f'__version__ = {version!r}\nclass cuda: is_available = staticmethod(lambda: False)\n'
        (self.folder / 'fake/torch.py').write_text(text)
        shutil.rmtree(self.folder / 'fake/__pycache__', ignore_errors=True)

    def plan(self, ready: str | None, compiled: str | None) -> None:
        """Code of the ops in the wheel of the index (None: it has none), and in the one that is compiled."""
        (self.folder / 'fake/plan').write_text(json.dumps({'ready': ready, 'compiled': compiled}))

    def environment(self, name: str) -> Setup:
        """Make an environment."""
        python = self.folder / name / 'bin/python'
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\nPYTHONPATH={self.folder}/fake exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        step = Step('mmcv', (), mmcv.provide_wheel, 'nothing', title='ops', pins=('onedl-mmcv', 'torch'))
        return Setup(self.folder / name, {'mmcv': step}, Display(self.out))

    def provide(self, name: str) -> list[str]:
        """Provide an environment with a wheel; return the calls of pip."""
        calls = self.folder / 'fake/calls'
        calls.unlink(missing_ok=True)
        setup = self.environment(name)
        setup.do(setup.steps['mmcv'])
        assert [path.name for path in (setup.venv / 'wheels').iterdir()] == [self.name]
        assert not list((self.folder).rglob('*.tmp'))
        assert not (setup.venv / 'mmcv').exists()
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def kept(self) -> list[Path]:
        """Wheels in the cache."""
        return sorted((self.folder / 'cache/wheels').rglob('*.whl'))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheels:
    return Wheels(tmp_path, monkeypatch)


def test_the_next_checkout_takes_the_wheel_of_the_first(wheels: Wheels) -> None:
    calls = wheels.provide('a')
    assert [call.split()[1] for call in calls] == ['download', 'wheel']
    assert '--prefer-binary' in calls[0]
    log = (wheels.folder / 'a/logs/mmcv.log').read_text()
    assert re.search(r'\[1/2\] c\+\+ .*-g0 \d+', log), log
    [kept] = wheels.kept
    assert kept.parent.name.startswith(f'torch-9.9-{sys.implementation.cache_tag}-')
    assert wheels.provide('b') == []
    assert f'from {kept}' in wheels.out.getvalue()
    wheels.torch('9.10')  # another torch has other wheels
    assert len(wheels.provide('c')) == 2
    assert len(wheels.kept) == 2


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'other torch', 'no ops'])
def test_a_broken_wheel_is_noticed_and_built_again(wheels: Wheels, damage: str) -> None:
    wheels.provide('a')
    [kept] = wheels.kept
    content = kept.read_bytes()
    if damage == 'flipped':
        with zipfile.ZipFile(kept, 'a') as file:
            file.writestr('mmcv/nms.py', 'bytes that will be damaged')
        content = kept.read_bytes()
        kept.write_bytes(content.replace(b'will be damaged', b'are now damaged'))
    elif damage in ('other torch', 'no ops'):
        with zipfile.ZipFile(kept, 'w') as file:
            file.writestr('mmcv/_ext.py' if damage == 'other torch' else 'mmcv/__init__.py', 'import not_there')
    else:
        kept.write_bytes(content[: len(content) // 2] if damage == 'cut' else b'')
    assert len(wheels.provide('b')) == 2
    assert 'is not used: ' in wheels.out.getvalue()
    assert wheels.provide('c') == []


def test_a_wheel_of_an_older_checkout_is_taken_over(wheels: Wheels) -> None:
    wheels.provide('a')
    [kept] = wheels.kept
    old = wheels.folder / f'.wheels/{pin("torch").replace("==", "-")}-3.{sys.version_info[1]}'
    old.mkdir(parents=True)
    kept.rename(old / kept.name)
    assert wheels.provide('b') == []
    assert wheels.kept == [kept]


def test_a_ready_wheel_of_the_index_is_taken(wheels: Wheels) -> None:
    wheels.plan(ready='', compiled='')
    assert [call.split()[1] for call in wheels.provide('a')] == ['download']
    wheels.torch('9.10')
    wheels.plan(ready='import not_there', compiled='')  # it is of another torch
    calls = wheels.provide('b')
    assert [call.split()[1] for call in calls] == ['download', 'download', 'wheel']
    assert '--no-binary=onedl-mmcv' in calls[1]
    assert "No module named 'not_there'" in wheels.out.getvalue()


def test_pages_of_ready_wheels(wheels: Wheels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMCV_LINKS', 'https://example.org/page.html')
    assert '--find-links=https://example.org/page.html' in wheels.provide('a')[0]


def test_a_cache_that_cannot_be_written_is_said(wheels: Wheels, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheels.folder / 'file').write_text('')
    monkeypatch.setenv('ASR_CACHE', str(wheels.folder / 'file/cache'))
    assert len(wheels.provide('a')) == 2
    assert 'is not kept for other checkouts: ' in wheels.out.getvalue()


def test_a_copy_that_fails_leaves_the_wheel_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('from', 'to'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.whl').write_text(name)
    (tmp_path / 'to/a.whl.123.tmp').write_text('of one that was killed')

    def full(source: object, target: io.BufferedWriter) -> None:
        target.write(b'half')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'copyfileobj', full)
        with pytest.raises(OSError, match='No space'):
            mmcv.keep(tmp_path / 'from/a.whl', tmp_path / 'to')
    assert {path.name: path.read_text() for path in (tmp_path / 'to').iterdir()} == {'a.whl': 'to'}
    mmcv.keep(tmp_path / 'from/a.whl', tmp_path / 'to')
    assert (tmp_path / 'to/a.whl').read_text() == 'from'


def test_an_interrupted_compilation_continues(wheels: Wheels) -> None:
    """Objects of an earlier try are where they were; an archive that was cut is downloaded again."""
    wheels.plan(ready=None, compiled='import not_there')
    setup = wheels.environment('a')
    with pytest.raises(StepFailed, match=r'(?s)cannot be used: .*not_there.*logs/mmcv.log'):
        setup.do(setup.steps['mmcv'])
    [tree] = [path for path in (setup.venv / 'mmcv').glob('*/*') if path.name.startswith('onedl') and path.is_dir()]
    (tree / 'a.o').write_text('compiled')
    wheels.plan(ready=None, compiled='')
    calls = wheels.provide('a')
    assert [call.split()[1] for call in calls] == ['wheel']
    assert calls[0].endswith(str(tree))
    assert "'a.o'" in (setup.venv / 'logs/mmcv.log').read_text()


def test_an_archive_that_was_cut_is_downloaded_again(wheels: Wheels) -> None:
    setup = wheels.environment('a')
    source = setup.venv / 'mmcv' / mmcv.kept_in(setup).name / 'source'
    source.mkdir(parents=True)
    archive = source / f'{mmcv.release()}.tar.gz'
    with tarfile.open(archive, 'w:gz') as file:
        file.add(ROOT / 'README.md', f'{mmcv.release()}/README.md')
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(StepFailed, match='was not downloaded whole'):
        setup.do(setup.steps['mmcv'])
    assert len(wheels.provide('a')) == 2


BUILD = """
cxx = c++

cflags = -O1 -I{folder} -c
post_cflags = -std=c++17 -H

rule compile
  command = $cxx $cflags -c $in -o $out $post_cflags

build a.o: compile {folder}/a.cpp
"""


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_the_common_header_is_compiled_once(tmp_path: Path) -> None:
    header = tmp_path / 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'
    header.parent.mkdir(parents=True)
    header.write_text('#pragma once\ninline int one() { return 1; }\n')
    (tmp_path / 'a.cpp').write_text(f'#include "{header.relative_to(tmp_path)}"\nint two() {{ return 2 * one(); }}\n')
    work = tmp_path / 'build/temp'
    work.mkdir(parents=True)
    (work / 'build.ninja').write_text(BUILD.format(folder=tmp_path))
    real = shutil.which('ninja', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    command = [sys.executable, str(ROOT / 'tools/environment/ninja.py'), str(real), '-v']
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    used = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('! ')]
    if 'Free Software Foundation' in subprocess.run(['c++', '--version'], capture_output=True, text=True).stdout:
        assert used == [f'! {header}.gch'], done.stdout  # gcc marks a compiled header that it takes with !
    assert (work / 'a.o').exists()
    assert command_of('nothing = 1', header) is None
