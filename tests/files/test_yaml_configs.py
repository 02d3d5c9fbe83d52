"""YAML configs are data: a tag that names Python code is refused before anything is run, in a base as well."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.diffusion import assert_refused, call, write_config

from asr_downstream.files.configs import read_config

TOOLS = {
    'diffusion/train.py': ('--dry-run',),
    'tools/distill_far.py': ('--dry-run',),
    'tools/prune_far.py': ('--keep', '0.5'),
    'tools/train_det.py': ('--dry-run',),
    'tools/test_det.py': ('none.pth',),
}

PARAMS = [pytest.param(name, marks=[pytest.mark.det] if 'det.' in name else [], id=Path(name).stem) for name in TOOLS]


def bomb(folder: Path) -> tuple[str, Path]:
    """A value that makes a folder where it is taken for code, and that folder."""
    mark = folder / 'it-ran'
    return f'!!python/object/apply:os.mkdir [{mark}]', mark


@pytest.mark.timeout(60)
@pytest.mark.parametrize('tool', PARAMS)
@pytest.mark.parametrize('form', ['.yaml', '.yml', 'base of yaml', 'base of python', 'base of a base'])
def test_tags_that_run_code_are_refused(tmp_path: Path, tool: str, form: str) -> None:
    value, mark = bomb(tmp_path)
    hostile = tmp_path / ('x.yml' if form == '.yml' else 'x.yaml')
    hostile.write_text(f'model: {value}\n')
    config = hostile
    if form == 'base of yaml':
        config = tmp_path / 'top.yaml'
        config.write_text('_base_: x.yaml\nseed: 1\n')
    elif form == 'base of python':
        config = tmp_path / 'top.py'
        config.write_text("_base_ = ['x.yaml']\nseed = 1\n")
    elif form == 'base of a base':
        (tmp_path / 'middle.py').write_text("_base_ = 'x.yaml'\n")
        config = tmp_path / 'top.yml'
        config.write_text('_base_: [middle.py]\n')
    done = call(tool, config, *TOOLS[tool])
    assert not mark.exists(), 'the file was run'
    assert_refused(done, str(config))
    assert not list(tmp_path.glob('work_dirs*'))


@pytest.mark.parametrize(
    'tag',
    ['!!python/name:os.system', '!!python/module:antigravity', '!!python/object/new:os.system [true]', '!run {}'],
)
def test_no_tag_of_python_is_known(tmp_path: Path, tag: str) -> None:
    path = tmp_path / 'x.yaml'
    path.write_text(f'model: {tag}\n')
    assert_refused(call('diffusion/train.py', path, '--dry-run'), str(path), 'tag')


def test_the_tool_without_this_package_takes_no_yaml(
    tmp_path: Path, tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    value, mark = bomb(tmp_path)
    path = tmp_path / 'x.yaml'
    path.write_text(f'model: {value}\n')
    done = tool('test_stock', path, 'none.pth')
    assert done.returncode == 2
    assert 'x.yaml: expected a .py config, as tools/fold.py writes it' in done.stderr
    assert not mark.exists()


def test_yaml_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / 'a.yaml'
    path.write_text('model: {type: UNet2DModel, blocks: !!python/tuple [8, [9, {a: 1}]]}\nrate: 1.0e-3\n')
    config = read_config(path, 'configs/')
    assert config.model == dict(type='UNet2DModel', blocks=(8, [9, dict(a=1)]))
    config.dump(tmp_path / 'b.yaml')
    assert read_config(tmp_path / 'b.yaml', 'configs/').to_dict() == config.to_dict()


def test_plain_yaml_is_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from mmengine.config import Config

    monkeypatch.chdir(ROOT)
    content = Config.fromfile(write_config(tmp_path)).to_dict()
    for suffix in ('.yaml', '.yml'):
        path = tmp_path / f'plain{suffix}'
        path.write_text(yaml.safe_dump({key: listed(value) for key, value in content.items()}))
        done = call('diffusion/train.py', path, '--dry-run')
        assert done.returncode == 0, done.stderr
        assert '12 sites' in done.stdout


def listed(value: object) -> object:
    """YAML has no tuples."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value
