"""A wheel of mmcv whose ops fit the torch of an environment: found, downloaded or compiled, and kept for the next one.

It is kept in ``wheels`` of ``$ASR_CACHE``, or of ``~/.cache/asr-downstream``, by torch, Python and platform.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from environment.steps import ROOT, Setup, Step, StepFailed, pin

PACKAGE = 'onedl-mmcv'
SHIM = Path(__file__).with_name('ninja.py')
MEMORY = 2 << 30  # bytes that a compiler may take
# The compiled module of a wheel, loaded where torch is: its symbols are those of one version of torch.
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location('_ext', sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
ABOUT = """
import os, torch
cuda = torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
print(f"torch-{torch.__version__}{'-ops_cuda' if cuda else ''}")
"""

__all__ = ['cache', 'fault', 'keep', 'provide_wheel']


def cache() -> Path:
    """Folder for what the next checkout can use."""
    return Path(os.environ.get('ASR_CACHE') or Path.home() / '.cache' / 'asr-downstream').expanduser()


def kept_in(setup: Setup) -> Path:
    """Folder of wheels for the torch and the Python of an environment, and for this platform.

    Raises:
        StepFailed: torch cannot be imported.
    """
    done = subprocess.run([setup.python, '-c', ABOUT], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepFailed(f'torch cannot be imported: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')
    tag = f'{done.stdout.strip()}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}'
    return cache() / 'wheels' / tag


def release() -> str:
    """Begin of the names of files of the mmcv that the constraints pin."""
    return pin(PACKAGE).replace('-', '_').replace('==', '-')


def wheels_of(folder: Path) -> list[Path]:
    """Wheels in a folder of the version of mmcv that the constraints pin."""
    return sorted(folder.glob(f'{release()}-*.whl'))


def fault(wheel: Path, python: Path) -> str:
    """What is wrong with a wheel: a broken file, no compiled ops, or ops of another torch; empty if nothing is."""
    try:
        with zipfile.ZipFile(wheel) as content, tempfile.TemporaryDirectory() as folder:
            bad = content.testzip()
            if bad:
                return f'{bad} in it is damaged'
            ops = [name for name in content.namelist() if name.startswith('mmcv/_ext.')]
            if not ops:
                return 'it has no compiled ops'
            command = [str(python), '-c', LOAD, content.extract(ops[0], folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return (done.stderr.strip().splitlines() or ['its ops cannot be loaded'])[-1] if done.returncode else ''
    except (OSError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        return f'it cannot be read: {error}'


def keep(wheel: Path, folder: Path) -> Path:
    """Copy a wheel into a folder: whole, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.tmp'):
        old.unlink(missing_ok=True)
    kept = folder / wheel.name
    new = folder / f'{wheel.name}.{os.getpid()}.tmp'
    try:
        with wheel.open('rb') as source, new.open('xb') as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        new.replace(kept)
    finally:
        new.unlink(missing_ok=True)
    return kept


def provide_wheel(setup: Setup, step: Step) -> None:
    """Put a wheel into ``wheels`` of the environment, and into the cache.

    Raises:
        StepFailed: none could be had.
    """
    ready, kept = setup.venv / 'wheels', kept_in(setup)
    before = ROOT / '.wheels' / f'{pin("torch").replace("==", "-")}-{sysconfig.get_python_version()}'
    for folder in (ready, kept, before):
        for wheel in wheels_of(folder):
            wrong = fault(wheel, setup.python)
            if wrong:
                setup.display.line(f'{step.title}: {wheel} is not used: {wrong}')
                continue
            setup.display.line(f'{step.title}: from {wheel}')
            settle(setup, wheel, ready, kept)
            return
    work = setup.venv / 'mmcv' / kept.name
    for wheel in obtain(setup, step, work):
        wrong = fault(wheel, setup.python)
        if not wrong:
            settle(setup, wheel, ready, kept)
            shutil.rmtree(setup.venv / 'mmcv', ignore_errors=True)
            return
        setup.display.line(f'{step.title}: {wheel.name} is not used: {wrong}')
    raise StepFailed(f'the ops that were compiled cannot be used: {wrong}')


def settle(setup: Setup, wheel: Path, ready: Path, kept: Path) -> None:
    """Take a wheel for the environment, as its only one, and keep it for others if the cache can be written."""
    if wheel.parent != ready:
        shutil.rmtree(ready, ignore_errors=True)
        keep(wheel, ready)
    if wheel.parent != kept:
        try:
            keep(wheel, kept)
        except OSError as error:
            setup.display.line(f'the wheel of mmcv is not kept for other checkouts: {error}')


def obtain(setup: Setup, step: Step, work: Path) -> Iterator[Path]:
    """Yield a wheel of the index or of ``$MMCV_LINKS``, if there is one, then the one that is compiled.

    What was compiled before an interruption is in ``work``, and is not compiled again.
    """
    links = os.environ.get('MMCV_LINKS')
    options = [f'--find-links={links}'] if links else []
    source = work / 'source'
    archive = source / f'{release()}.tar.gz'
    for choice in ('--prefer-binary', f'--no-binary={PACKAGE}'):
        if not archive.exists():
            shutil.rmtree(source, ignore_errors=True)
            setup.run(step, pip(setup, 'download', choice, *options, '--dest', str(source), pin(PACKAGE)))
            yield from wheels_of(source)
    if not archive.exists():
        raise StepFailed(f'the index has no {archive.name}')
    yield compile_ops(setup, step, archive, work)


def compile_ops(setup: Setup, step: Step, archive: Path, work: Path) -> Path:
    """Compile the ops of a source archive, or go on with it."""
    tree = work / archive.name.removesuffix('.tar.gz')
    if not tree.is_dir():
        try:
            with tempfile.TemporaryDirectory(dir=work) as new, tarfile.open(archive) as content:
                content.extraction_filter = getattr(tarfile, 'data_filter', None)  # Python has it since 3.10.12
                content.extractall(new)
                (Path(new) / tree.name).replace(tree)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            archive.unlink()
            raise StepFailed(
                f'{archive.name} was not downloaded whole ({error}); the next try downloads it again'
            ) from error
    out = work / 'out'
    shutil.rmtree(out, ignore_errors=True)
    setup.run(step, pip(setup, 'wheel', '--verbose', '--wheel-dir', str(out), str(tree)), build_variables(setup, work))
    wheel = next(out.glob('*.whl'), None)
    if wheel is None:
        raise StepFailed('pip made no wheel')
    return wheel


def build_variables(setup: Setup, work: Path) -> dict[str, str]:
    """Environment variables of the compilation: no debug symbols, as many compilers as there is room for, our ninja."""
    shim, scripts = work / 'bin' / 'ninja', setup.python.parent
    path = f'{scripts}{os.pathsep}{os.environ.get("PATH", os.defpath)}'
    real = shutil.which('ninja', path=path)
    if real:
        shim.parent.mkdir(parents=True, exist_ok=True)
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SHIM}" "{real}" "$@"\n')
        shim.chmod(0o755)
        path = f'{shim.parent}{os.pathsep}{path}'
    jobs = os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError, AttributeError):
        jobs = len(os.sched_getaffinity(0))
        jobs = max(1, min(jobs, os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // MEMORY))
    return {
        'PATH': path,
        'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0'.strip(),
        'MAX_JOBS': os.environ.get('MAX_JOBS', str(jobs)),
    }


def pip(setup: Setup, command: str, *options: str) -> list[str]:
    """Command line of pip for mmcv alone, at its pinned version, built with what the environment has."""
    words = [
        str(setup.python),
        '-m',
        'pip',
        '--disable-pip-version-check',
        command,
        '--no-deps',
        '--no-build-isolation',
    ]
    return [*words, *options]
