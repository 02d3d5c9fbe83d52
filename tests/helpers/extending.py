"""The package of docs/extending.md, as a user would write it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

MODULE = re.compile(r'^```python\n# (mypackage/\w+\.py)\n(.*?)^```', re.MULTILINE | re.DOTALL)


def write_package(folder: Path) -> Path:
    """Write ``mypackage`` into a folder, each Python block of the page into the module that it names."""
    (folder / 'mypackage').mkdir(parents=True)
    (folder / 'mypackage/__init__.py').touch()
    blocks = MODULE.findall((ROOT / 'docs/extending.md').read_text())
    for name, block in blocks:
        (folder / name).write_text(block)
    return folder


def run(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process of its own, with a folder on the path of Python, or with none."""
    paths = [str(p) for p in (ROOT, path) if p is not None]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(paths)}
    words = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
