"""The README's code is run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
TEXTS = README + (ROOT / 'det_configs/README.md').read_text() + (ROOT / 'diffusion/README.md').read_text()
COMMANDS = re.findall(r'((?:tools|diffusion)/\w+\.py)([^\n`#]*)', TEXTS)


RUNNABLE = [b for b in BLOCKS if not any(word in b for word in ('init_detector', '_base_', 'from_pretrained('))]


@pytest.mark.parametrize('block', RUNNABLE, ids=range(len(RUNNABLE)))
def test_python_blocks_run(block: str) -> None:
    done = subprocess.run([sys.executable, '-c', block], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.det
def test_the_config_block_builds_a_plugged_detector(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    from asr_downstream import describe
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.models.detectors import build_detector

    path = tmp_path / 'config.py'
    path.write_text(next(b for b in BLOCKS if '_base_' in b))
    assert len(describe(build_detector(load_config(path))).sites) == 13


def test_the_diffusion_block_is_a_config_of_a_plugged_unet(tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream import describe
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model

    path = tmp_path / 'config.py'
    path.write_text(next(b for b in BLOCKS if 'max_train_steps' in b))
    assert len(describe(build_model(load_config(path))).sites) == 18


def test_the_tables_of_sites_are_the_data() -> None:
    from asr_downstream.plugging.sites import sites_table

    assert sites_table() in README


def test_commands_name_tools_and_options_that_exist() -> None:
    assert len(COMMANDS) >= 5
    for script, arguments in COMMANDS:
        source = (ROOT / script).read_text() + (ROOT / 'asr_downstream/console/cli.py').read_text()
        for option in re.findall(r'--[a-z-]+', arguments):
            assert f"'{option}'" in source, f'{script} {option}'


def test_make_targets_and_links_exist() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'^make ([a-z-]+)', README, re.MULTILINE):
        assert f'\n{target}:' in makefile
    for link in re.findall(r'\]\(([^)#:]+)\)', README):
        assert (ROOT / link).exists(), link
