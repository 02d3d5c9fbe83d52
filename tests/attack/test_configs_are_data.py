"""YAML configs are data: reading one constructs mappings and lists and runs nothing, whichever tool reads it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from asr_downstream.configs import read_config
from asr_downstream.errors import AsrError

TOOLS = {
    'diffusion/train.py': ['--dry-run'],
    'tools/distill_far.py': ['--dry-run'],
    'tools/prune_far.py': ['--keep', '0.5'],
    'tools/train_det.py': ['--dry-run'],
    'tools/test_det.py': ['none.pth'],
}
DETECTION = [name for name in TOOLS if name.endswith('_det.py')]


def hostile(folder: Path, suffix: str = '.yaml') -> tuple[Path, Path]:
    """A config that makes a file when Python objects in it are constructed, and that file."""
    made = folder / 'made'
    path = folder / f'hostile{suffix}'
    path.write_text(f'model: !!python/object/apply:os.mkdir ["{made}"]\n')
    return path, made


@pytest.mark.parametrize('suffix', ['.yaml', '.yml'])
def test_a_python_object_in_yaml_is_an_error(tmp_path: Path, suffix: str) -> None:
    path, made = hostile(tmp_path, suffix)
    with pytest.raises(AsrError, match=rf'hostile{suffix}: is not a config that can be read .*python/object/apply'):
        read_config(path, 'configs/')
    assert not made.exists()


@pytest.mark.parametrize('suffix', ['.py', '.yaml'])
def test_so_it_is_in_a_base_of_another_config(tmp_path: Path, suffix: str) -> None:
    path, made = hostile(tmp_path)
    outer = tmp_path / f'outer{suffix}'
    outer.write_text("_base_ = ['hostile.yaml']\n" if suffix == '.py' else '_base_: [hostile.yaml]\n')
    with pytest.raises(AsrError, match=r'outer\S+ is not a config that can be read .*python/object/apply'):
        read_config(outer, 'configs/')
    assert not made.exists()


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.det] if n in DETECTION else []) for n in TOOLS])
def test_no_tool_runs_what_a_yaml_config_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = hostile(tmp_path)
    arguments = [str(path), *TOOLS[name]]
    monkeypatch.setattr(sys, 'argv', [name, *arguments])
    with pytest.raises((AsrError, SystemExit)):
        runpy.run_path(str(ROOT / name))['main'](arguments)
    assert not made.exists()


def test_the_tool_without_this_package_takes_no_yaml(
    tmp_path: Path, tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path, made = hostile(tmp_path)
    done = tool('test_stock', path, 'none.pth')
    assert done.returncode == 2
    assert 'hostile.yaml: expected a .py config, as tools/fold.py writes it' in done.stderr
    assert not made.exists()


def test_yaml_is_still_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / 'a.yaml'
    path.write_text('model: {type: UNet2DModel, sample_size: 8}\nrate: 1.0e-3\n')
    config = read_config(path, 'configs/')
    assert config.model == dict(type='UNet2DModel', sample_size=8)
    config.dump(tmp_path / 'b.yaml')
    assert read_config(tmp_path / 'b.yaml', 'configs/').rate == 1e-3
