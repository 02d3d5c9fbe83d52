"""The wheel, built from the source distribution and installed where no checkout is: commands and ready configs work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from asr_downstream.commands.main import COMMANDS
from asr_downstream.files.ready import FOLDERS

FILES = ('LICENSE', 'MANIFEST.in', 'README.md', 'constraints.txt', 'pyproject.toml', 'setup.py')
FOLDERS_OF_CHECKOUT = ('asr_downstream', 'det_configs', 'diffusion', 'tools')
SDIST = 'import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))'


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp('built')
    for name in FOLDERS_OF_CHECKOUT:  # without what earlier builds have left
        shutil.copytree(ROOT / name, folder / 'checkout' / name)
    for name in FILES:
        shutil.copy(ROOT / name, folder / 'checkout' / name)
    done = run(sys.executable, '-c', SDIST, folder, cwd=folder / 'checkout')
    assert done.returncode == 0, done.stderr
    sdist = folder / done.stdout.splitlines()[-1]
    options = ['--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', folder]
    done = run(sys.executable, '-m', 'pip', 'wheel', sdist, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob('*.whl')
    return sdist, wheel


@pytest.fixture(scope='module')
def program(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`asr-downstream` of an environment that has the wheel, and all else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp('installed') / 'venv'
    venv.create(folder)
    python = folder / 'bin' / 'python'
    done = run(
        sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', built[1], cwd=folder
    )
    assert done.returncode == 0, done.stderr
    [site] = folder.glob('lib/python*/site-packages')
    # as a path alone, so that the .pth files in it, such as that of an editable installation, are not read
    (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return folder / 'bin' / 'asr-downstream'


def configs(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for folder in FOLDERS for path in (root / folder).rglob('*.py')}


def test_what_the_distributions_hold(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    ready = configs(ROOT)
    assert 'det_configs/_base_/digits.py' in ready
    with tarfile.open(sdist) as archive:
        packed = {name.partition('/')[2] for name in archive.getnames()}
    assert {'LICENSE', 'setup.py', 'pyproject.toml', *ready} <= packed
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'asr_downstream/far/model/ops/lstm.{kind}' for kind in ('cpp', 'h', 'py')} <= names & packed
    held = {name.removeprefix('asr_downstream/_configs/') for name in names if '/_configs/' in name}
    assert held == ready
    assert any(re.fullmatch(r'asr_downstream-[^/]*\.dist-info/licenses/LICENSE', name) for name in names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'asr_downstream').rglob('*.py')}
    assert modules == {name for name in names if name.endswith('.py') and '/_configs/' not in name}
    assert {name.split('/')[0] for name in names if '.dist-info' not in name} == {'asr_downstream'}


def test_the_list_of_commands(program: Path, tmp_path: Path) -> None:
    begin = time.perf_counter()
    done = run(program, '--help', cwd=tmp_path)
    assert time.perf_counter() - begin < 10  # 1 s on a quiet machine
    assert done.returncode == 0, done.stderr
    assert all(f'  {name} ' in done.stdout for name in COMMANDS)
    done = run(program.with_name('python'), '-X', 'importtime', program, '--help', cwd=tmp_path)
    imported = {line.rpartition('|')[2].strip().partition('.')[0] for line in done.stderr.splitlines()}
    assert 'asr_downstream' in imported
    assert not imported & {'torch', 'mmengine', 'rich', 'numpy'}


@pytest.mark.slow
def test_a_ready_config_by_name(program: Path, tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    done = run(program, 'configs', '--path', 'unet-w32_digits', cwd=tmp_path)
    path = Path(done.stdout.strip())
    assert path.is_relative_to(program.parent.parent), done.stdout + done.stderr
    assert path.read_text() == (ROOT / 'diffusion/configs/unet-w32_digits.py').read_text()
    begin = time.perf_counter()
    done = run(program, 'train-diffusion', 'unet-w32_digits', '--dry-run', cwd=tmp_path)
    assert time.perf_counter() - begin < 80  # 8 s on a quiet machine
    assert done.returncode == 0, done.stderr
    assert re.search(r'steps.*2,000 of 64 images', done.stdout)
    assert not any(tmp_path.iterdir())


@pytest.mark.det
@pytest.mark.slow
def test_every_adapter_reads_configs_that_inherit(program: Path, tmp_path: Path) -> None:
    for name, words in (
        ('train-diffusion', ['unet-w32-asr-se_digits', '--dry-run']),
        ('distill-far', ['vit-w64_digits', '--dry-run']),
        ('prepare-data', ['digits', tmp_path / 'digits']),
        ('train-det', ['retinanet_r18-w16-asr-se_fpn_digits', '--dry-run', '--data-root', tmp_path / 'digits']),
    ):
        done = run(program, name, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert 'backbone.layer1.0.bn2' in done.stdout
    missing = run(program, 'train-det', 'faster-rcnn_r50-asr-se-c3-c5_fpn_1x_coco', '--dry-run', cwd=tmp_path)
    assert missing.returncode == 1
    assert 'data/coco/annotations/instances_train2017.json: no such annotation file' in missing.stderr
