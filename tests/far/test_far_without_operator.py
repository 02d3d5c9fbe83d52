"""FAR computes the same where its operator was not built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FILES = ('test_far.py', 'test_far_pruning.py', 'test_far_corners.py')


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the cache holds no operator."""
    env = {**os.environ, 'ASR_CACHE': str(tmp_path / 'cache')}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=900
    )


def test_the_cache_decides(tmp_path: Path) -> None:
    """What the other test rests on."""
    done = run(tmp_path, '-c', 'from asr_downstream.far.model.ops.build import built; print(built())')
    assert done.stdout.strip() == 'None', done.stderr


@pytest.mark.slow
def test_the_tests_pass_without_it(tmp_path: Path) -> None:
    files = [str(Path('tests/far') / name) for name in FILES]
    done = run(tmp_path, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow', *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert ' passed' in done.stdout
