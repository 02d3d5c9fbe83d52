"""The rules of the house that `lint-imports` cannot hold: modules looked up by name, and what stays readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'asr_downstream'
MODULES = sorted(PACKAGE.rglob('*.py'))
# Where modules may be named by text: look-ups of registries, lazy names of the package, the table of its commands.
LOOK_UPS = ('registry.py', '__init__.py', 'commands/main.py')


def named_modules(path: Path) -> Iterator[str]:
    """Texts of a module, docstrings left out, that are the name of a module of the package."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            package, *parts = node.value.split('.')
            place = PACKAGE.joinpath(*parts)
            there = place.is_dir() or place.with_suffix('.py').is_file()
            if package == 'asr_downstream' and parts and all(parts) and there:
                yield node.value


def test_modules_are_looked_up_by_name_where_it_is_declared() -> None:
    found = {str(p.relative_to(PACKAGE)): names for p in MODULES if (names := list(named_modules(p)))}
    assert found['registry.py']
    assert set(found) <= set(LOOK_UPS), found


def test_a_name_of_a_module_in_a_text_is_found(tmp_path: Path) -> None:
    hidden = tmp_path / 'hidden.py'
    lines = ["'''asr_downstream.far'''", "name = 'asr_downstream.plugging.plug'", "other = 'asr_downstream.json'"]
    hidden.write_text('\n'.join(lines))
    assert list(named_modules(hidden)) == ['asr_downstream.plugging.plug']


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 370  # about 350


def test_folders_have_few_names() -> None:
    for folder in {path.parent for path in MODULES}:
        names = [p for p in folder.iterdir() if p.name not in ('__init__.py', '__main__.py', '__pycache__')]
        assert len(names) <= 16, folder


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    """`lint-imports` is what holds the layers: it sees an import inside a function, too."""
    copy = tmp_path / 'asr_downstream'
    for path in MODULES:
        to = copy / path.relative_to(PACKAGE)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(path.read_text())
    (tmp_path / 'pyproject.toml').write_text((ROOT / 'pyproject.toml').read_text())
    assert lint(tmp_path).returncode == 0
    with (copy / 'errors.py').open('a') as file:
        file.write('\n\ndef late() -> None:\n    from asr_downstream.plugging import plug  # noqa: F401\n')
    broken = lint(tmp_path)
    assert broken.returncode == 1
    assert 'asr_downstream.errors -> ' in broken.stdout


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(Path(sys.executable).with_name('lint-imports')), '--no-cache']
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
