"""`asr-downstream`: its table, the help of every command, the scripts beside them, ready configs by name."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.command_lines import parse
from helpers.documents import commands

from asr_downstream.commands import main as console
from asr_downstream.commands.configs import TAKEN_BY
from asr_downstream.console import cli
from asr_downstream.errors import AsrError
from asr_downstream.files import ready

COMMANDS = console.COMMANDS
SCRIPTED = {name: command.script for name, command in COMMANDS.items() if command.script}
# Programs of the checkout, and those that show that this package is not needed.
NOT_COMMANDS = {
    'backbones', 'benchmark', 'demo', 'exports', 'native', 'sample_stock', 'setup_env', 'stock_only', 'test_stock',
}  # fmt: skip
IMPORTED = re.compile(r'^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$', re.MULTILINE)


def marked(names: Iterable[str]) -> list[object]:
    """Commands as parameters, those of detection marked."""
    return [pytest.param(n, marks=pytest.mark.det if '.detection.' in COMMANDS[n].module else ()) for n in names]


def help_of(name: str, script: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    if '.diffusion.' in COMMANDS[name].module:
        pytest.importorskip('diffusers')
    monkeypatch.setenv('COLUMNS', '120')
    main = console.script(name) if script else lambda argv: console.main([name, *argv])
    with pytest.raises(SystemExit) as done:
        main(['--help'])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_every_script_is_a_command_or_a_program_of_the_checkout() -> None:
    scripts = {f'{folder}/{path.name}' for folder in ('tools', 'diffusion') for path in (ROOT / folder).glob('*.py')}
    assert scripts - {f'tools/{name}.py' for name in NOT_COMMANDS} == set(SCRIPTED.values())
    for name, script in SCRIPTED.items():
        text = (ROOT / script).read_text()
        assert f"main = script('{name}')" in text, 'calls its command'
        assert len(text.splitlines()) < 15, 'and does nothing else'


def test_the_list_has_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.main(['--help'])
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf'^  {name} +{re.escape(command.line)}$', text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 100
    console.main([])
    assert capsys.readouterr().out == text


def test_the_table_of_the_document_is_the_table_of_the_program() -> None:
    rows = re.findall(
        r'^\| `([\w-]+)` \| (.*) \| (?:`(.*)`)? ?\|$', (ROOT / 'docs/commands.md').read_text(), re.MULTILINE
    )
    assert rows == [(name, command.line, command.script or '') for name, command in COMMANDS.items()]


@pytest.mark.parametrize('name', marked(COMMANDS))
def test_help_says_what_was_called_and_has_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(name, False, capsys, monkeypatch)
    assert text.startswith(f'usage: asr-downstream {name} ')
    assert re.search(rf'^ +asr-downstream {name} \S', text, re.MULTILINE), 'an example'
    assert not re.search(r'(?<![\w/])(tools|diffusion)/\w+\.py', text), 'names commands, no scripts'
    examples = re.findall(r'^    +((?:asr-downstream|python|accelerate) .*)$', text, re.MULTILINE)
    for script, arguments in commands('\n'.join(examples)):
        assert script == 'asr-downstream'
        if len(arguments) > 1:
            parse(script, arguments)


@pytest.mark.parametrize('name', marked(SCRIPTED))
def test_a_script_is_its_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(name, True, capsys, monkeypatch)
    assert text.startswith(f'usage: python {SCRIPTED[name]} ')
    assert not re.search(r'asr-downstream (?!configs)', text)
    assert console.to_commands(text).split() == help_of(name, False, capsys, monkeypatch).split()


def test_errors_name_what_was_called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('diffusers')
    monkeypatch.setattr(sys, 'argv', ['asr-downstream', 'evaluate-far', 'nowhere'])
    with pytest.raises(SystemExit) as done:
        console.program()
    assert done.value.code == 1
    assert 'run asr-downstream distill-far first' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(lambda argv: console.script('evaluate-far')(['nowhere']))
    assert 'run tools/distill_far.py first' in capsys.readouterr().err


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['asr-downstream', 'train-diffusio'])
    with pytest.raises(SystemExit) as done:
        console.program()
    assert done.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 'train-diffusio' is no command of asr-downstream; did you mean 'train-diffusion'?")
    assert error.count('\n') == 1


def test_messages_of_a_wheel_install_from_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "needs the extra far; install it with: pip install -c constraints.txt -e '.[far]'"
    assert console.to_commands(text) == text
    monkeypatch.setattr(ready, 'ROOT', ready.PACKAGE / '_configs')
    assert console.to_commands(text) == "needs the extra far; install it with: pip install 'asr-downstream[far]'"


# Start-up -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('words', 'seconds'), [(['--help'], 1), (['train-diffusion', '--help'], 2)])
def test_help_imports_no_torch(words: list[str], seconds: float) -> None:
    """The time is that of a quiet machine, ten times over; what is imported holds on every machine."""
    command = [sys.executable, '-X', 'importtime', '-m', 'asr_downstream', *words]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 10 * seconds
    imported = {name.partition('.')[0] for name in IMPORTED.findall(done.stderr)}
    assert {'asr_downstream', 'argparse'} <= imported
    assert not imported & {'torch', 'mmengine', 'mmdet', 'mmcv', 'rich', 'numpy', 'diffusers', 'accelerate'}


LAZY = """
import sys
import asr_downstream
assert not {'torch', 'mmengine', 'rich', 'numpy'} & sys.modules.keys()
assert {*asr_downstream.__all__, 'far', 'registry', '__version__'} <= {*dir(asr_downstream)}
assert asr_downstream.far.replace.__module__ == 'asr_downstream.far.model.replace'
assert {*asr_downstream.far.__all__} <= {*dir(asr_downstream.far)}
from asr_downstream import *
from asr_downstream.far import Budget, cut
for name in asr_downstream.__all__:
    assert globals()[name] is getattr(asr_downstream, name) is vars(asr_downstream)[name], name
for name in ('plugg', 'torch'):
    assert not hasattr(asr_downstream, name) and not hasattr(asr_downstream.far, name)
try:
    from asr_downstream import nothing
except ImportError as error:
    assert "cannot import name 'nothing'" in str(error)
from mmengine.registry import MODELS, DefaultScope
assert MODELS.switch_scope_and_registry('asr_downstream').__enter__() is asr_downstream.MODELS
print('fine')
"""


def test_names_are_imported_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, '-c', LAZY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == 'fine\n', done.stderr


# Ready configs by name ------------------------------------------------------------------------------------------------


def test_names_of_ready_configs() -> None:
    wanted = ROOT / 'diffusion/configs/unet-w32_digits.py'
    for given in (
        'unet-w32_digits',
        'unet-w32_digits.py',
        'configs/unet-w32_digits',
        'diffusion/configs/unet-w32_digits.py',
    ):
        assert ready.find_config(Path(given), 'diffusion/configs').resolve() == wanted
    with pytest.raises(AsrError, match=r"^unet-w32_digts: no such config; did you mean 'unet-w32_digits'.*configs"):
        ready.find_config(Path('unet-w32_digts'), 'diffusion/configs')
    for given in ('_base_/digits', 'other/unet-w32_digits', 'unet-w32_digits.yaml'):
        with pytest.raises(AsrError, match='no such config'):
            ready.find_config(Path(given), 'diffusion/configs')


def test_a_file_comes_before_a_name_and_two_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ready, 'ROOT', tmp_path / 'root')
    for path in (
        'root/det_configs/a/same.py',
        'root/det_configs/b/same.py',
        'root/det_configs/_base_/same.py',
        'own.py',
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(AsrError, match=r'same: is the name of several.*a/same.py, det_configs/b/same.py; give more'):
        ready.find_config(Path('same'), 'det_configs')
    assert ready.find_config(Path('b/same'), 'det_configs') == tmp_path / 'root/det_configs/b/same.py'
    assert ready.find_config(Path('own.py'), 'det_configs') == Path('own.py')


def test_every_ready_config_is_listed_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(TAKEN_BY) == ready.FOLDERS
    console.main(['configs'])
    lines = capsys.readouterr().out.splitlines()
    for folder in ready.FOLDERS:
        found = ready.ready_configs(folder)
        assert found
        for path in found:
            assert ready.find_config(Path(path.stem), folder) == path, 'one name, one config'
            said = ready.line_of(path)
            assert said, path
            [line] = [line for line in lines if line.split()[0] == path.stem and said.split()[0] in line]
            assert len(line) < 160
    console.main(['configs', 'UNET', 'digits', '--path'])
    paths = capsys.readouterr().out.split()
    assert all(Path(path).is_file() and 'unet' in path and 'digits' in path for path in paths)
    assert len(paths) >= 4
    with pytest.raises(SystemExit):
        console.main(['configs', 'nothing-of-that-name'])
