"""The site of the documents, where the extra docs is installed: no warning, no dead link, no request elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip('material', reason='needs the extra docs')


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(out)]
    environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


def test_the_site_builds_without_a_warning_and_reads_offline(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / 'site')
    assert done.returncode == 0, done.stderr
    assert 'WARNING' not in done.stdout + done.stderr
    pages = [*(tmp_path / 'site').rglob('*.html')]
    assert len(pages) > 20
    for page in pages:
        html = page.read_text()
        assert not re.findall(r'<(?:script|img|link|source)\b[^>]*(?:src|href|srcset)="(?:https?:)?//', html), page
        for picture in re.findall(r'<(?:img|source)\b[^>]*(?:src|srcset)="([^"]+)"', html):
            assert (page.parent / picture).exists(), f'{page}: {picture}'


def test_a_dead_link_is_an_error(tmp_path: Path) -> None:
    for folder in ('asr_downstream', 'det_configs', 'diffusion', 'docs', 'tools'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    for path in (*ROOT.glob('*.md'), ROOT / 'mkdocs.yml', ROOT / 'LICENSE'):
        shutil.copy(path, tmp_path)
    (tmp_path / 'docs/dia.md').write_text('# DIA\n\n[dead](nowhere.md)\n')
    done = build(tmp_path, tmp_path / 'site')
    assert done.returncode != 0
    assert 'nowhere.md' in done.stderr
