"""Building the operator: compiled once with torch's extension builder, and kept in the user's cache.

Its place is ``ops/lstm-A/B.so``: A stands for torch, Python, processor and source, B for the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from asr_downstream.errors import AsrError
from asr_downstream.far.model.ops import compile as program
from asr_downstream.files.atomic import flush, remove, writable_folder, writing
from asr_downstream.files.cache import cache_folder
from asr_downstream.files.locks import occupied
from asr_downstream.files.ready import PACKAGE

__all__ = ['build', 'built', 'folder']

WAIT_SECONDS = 600.0  # for another process that builds the same


def build(again: bool = False) -> Path:
    """Compile the operator, unless it is there for this torch, Python, processor and compiler.

    It is compiled in a folder of its own, tried there by another process, and then moved to its place in one step.

    Args:
        again: compile it even so.

    Returns:
        The library.

    Raises:
        AsrError: there is no compiler, it fails, or the cache cannot be written.
    """
    version = compiler()
    library = folder() / f'{digest(version)}.so'
    with occupied(folder(), WAIT_SECONDS):
        if library.is_file() and not again:
            return library
        for left in folder().glob('.*.tmp'):  # of a build that was killed
            remove(left)
        aside = writable_folder(folder() / f'.{os.getpid()}.tmp')
        try:
            run_compiler(aside, 'clang' if 'clang' in version else 'gcc')
            with writing(library):
                flush(aside / f'{program.NAME}.so')
                os.replace(aside / f'{program.NAME}.so', library)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return library


def built() -> Path | None:
    """Return the library for this torch, Python and processor, the newest if several compilers made one."""
    found = [path for path in folder().glob('*.so') if not path.name.startswith('.')]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def folder() -> Path:
    """Folder in the cache for this torch, Python, processor and source."""
    return cache_folder() / 'ops' / f'{program.NAME}-{here()}'


@cache
def here() -> str:
    """Fingerprint of all that a library depends on, but for the compiler."""
    made_for = (torch.__version__, torch.version.git_version, sys.implementation.cache_tag, processor())
    sources = [path.read_text(encoding='utf-8') for path in program.SOURCES]
    return digest(*map(str, made_for), *program.FLAGS, program.OPENMP, *sources)


def processor() -> str:
    """Kind and abilities of the processor: a cache may be shared by machines that differ."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(':')[2] for line in lines if line.lower().startswith(('flags', 'features'))), '')
    return f'{platform.system()} {platform.machine()} {platform.processor()} {" ".join(sorted(flags.split()))}'


def compiler() -> str:
    """Return the path of the compiler and what it says of its version.

    Raises:
        AsrError: there is none.
    """
    words = shlex.split(os.environ.get('CXX', '')) or ['c++']
    path = shutil.which(words[0])
    if path is None:
        raise AsrError(
            f'no C++ compiler: {words[0]!r} is not found; install one (Debian: apt-get install g++) or name it in CXX. '
            f'Without the operator FAR runs as torch has it, slower'
        )
    try:
        done = subprocess.run([path, *words[1:], '--version'], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AsrError(f'{path}: is no compiler that runs ({error}); name another in CXX') from error
    return f'{path} {done.stdout}'


def run_compiler(aside: Path, kind: str) -> None:
    """Compile into a folder, in another process, with gcc or clang.

    Raises:
        AsrError: it failed; the message has the first error in its output.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])  # ninja lies beside python
    done = subprocess.run(
        [sys.executable, '-m', program.__name__, str(aside), kind],
        cwd=PACKAGE.parent,
        env={**os.environ, 'PATH': path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not (aside / f'{program.NAME}.so').is_file():
        log = folder() / 'failed.log'
        log.write_text(done.stdout, encoding='utf-8')
        lines = [*done.stdout.splitlines(), f'exit code {done.returncode}']
        first = next((line for line in lines if re.search(r'error\b|fatal', line, re.IGNORECASE)), lines[-1])
        raise AsrError(
            f'the operator does not compile here ({first.strip()[:200]}; all of it is in {log}); it needs a C++ '
            f'compiler that knows C++20, and ninja (pip install ninja). Without it FAR runs as torch has it, slower'
        )


def digest(*texts: str) -> str:
    """Short hash."""
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:16]
