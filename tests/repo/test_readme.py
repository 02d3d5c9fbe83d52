"""The documents are right: Python blocks are run, commands are parsed by their tools, links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.command_lines import parse
from helpers.documents import DOCUMENTS, FENCE, Document, commands
from helpers.interpreter import Interpreter

from asr_downstream.commands.main import COMMANDS as CONSOLE
from asr_downstream.files.ready import FOLDERS, find_config

README = (ROOT / 'README.md').read_text()
TEXTS = '\n'.join(document.text for document in DOCUMENTS)
# What is compiled and not run, and why.
NOT_RUN = {
    'init_detector(': 'loads a shipped detector; test_fold_ships_what_plain_mmdetection_loads does',
    "from_pretrained('OUT')": 'loads a shipped pipeline; tests/diffusion/test_diffusion_shipping.py runs the card',
    "from_pretrained('shipped/digits')": 'the same',
    "load_plugged('out/unet')": 'loads what was saved; tests/plugging/test_saving_plugged.py does',
    '_base_ =': 'a config, built below',
}
BLOCKS = [(document.name, block) for document in DOCUMENTS for block in document.blocks('python')]
RUNNABLE = [(name, block) for name, block in BLOCKS if not any(words in block for words in NOT_RUN)]
COMMANDS = [(document.name, *command) for document in DOCUMENTS for command in document.commands()]


@pytest.fixture(scope='module')
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as found:
        yield found


@pytest.mark.parametrize('document', sorted({name for name, _ in RUNNABLE}))
def test_python_blocks_run(document: str, interpreter: Interpreter) -> None:
    blocks = [block for name, block in RUNNABLE if name == document]
    if any('from transformers' in block for block in blocks):
        pytest.importorskip('transformers')
    code, text = interpreter.run(blocks)
    assert code == 0, text


def test_the_interpreter_tells_what_failed_and_keeps_nothing(interpreter: Interpreter) -> None:
    code, text = interpreter.run(['x = 1', 'print(x)'])
    assert code == 1, 'blocks share no names'
    assert "NameError: name 'x' is not defined" in text
    assert interpreter.run(['import math; math.pi = 3']) == (0, '')
    assert interpreter.run(['import math; assert math.pi > 3; print("seen")']) == (0, 'seen\n')


def test_python_blocks_that_are_not_run_compile() -> None:
    for words, why in NOT_RUN.items():
        blocks = [block for _, block in BLOCKS if words in block]
        assert blocks, f'no block has {words} ({why}): take it out of the list'
        for block in blocks:
            compile(block, words, 'exec')


@pytest.mark.det
def test_the_config_block_builds_a_plugged_detector(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    from asr_downstream import describe
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.models.detectors import build_detector

    (tmp_path / '_base_').symlink_to(ROOT / 'det_configs/_base_')
    path = tmp_path / 'retinanet/config.py'
    path.parent.mkdir()
    blocks = {block for _, block in BLOCKS if '_base_' in block}
    for block in blocks:
        path.write_text(block)
        assert len(describe(build_detector(load_config(path))).sites) == 13


def test_the_diffusion_block_is_a_config_of_a_plugged_unet(tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream import describe
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model

    path = tmp_path / 'config.py'
    path.write_text(next(block for _, block in BLOCKS if 'max_train_steps' in block))
    assert len(describe(build_model(load_config(path))).sites) == 18


def test_the_tables_of_sites_are_the_data() -> None:
    from asr_downstream.plugging.sites import sites_table

    assert sites_table() in (ROOT / 'docs/sites.md').read_text()


@pytest.mark.det
def test_commands_name_tools_and_options_that_exist() -> None:
    pytest.importorskip('mmdet')
    assert len(COMMANDS) >= 50
    wrong = []
    for name, script, arguments in COMMANDS:
        if script == 'tools/dist_train.sh':  # CONFIG, number of processes, and what train_det.py takes
            assert (ROOT / script).exists()
            script, arguments = 'tools/train_det.py', [*arguments[:1], *arguments[2:]]
        if script == 'asr-downstream':
            if arguments and arguments[0] not in (*CONSOLE, 'COMMAND', '--help'):
                wrong.append(f'{name}: no asr-downstream {arguments[0]}')
                continue
            arguments = arguments if len(arguments) > 1 and arguments[0] in CONSOLE else []
        elif not (ROOT / script).exists():
            wrong.append(f'{name}: no {script}')
            continue
        if script == 'tools/setup_env.py' or not arguments:  # it has no parser; or the tool is only named
            continue
        try:
            parse(script, arguments)
        except SystemExit as refused:
            if refused.code:
                wrong.append(f'{name}: {script} {" ".join(arguments)}')
    assert not wrong, '\n'.join(wrong)


def test_code_in_the_text_is_on_one_line() -> None:
    """Else a command in it is not seen by the tests above."""
    for document in DOCUMENTS:
        text = FENCE.sub('', document.text)
        broken = [code for code in re.findall(r'`[^`]+`', text) if '\n' in code]
        assert not broken, f'{document.name}: {broken}'


def test_ready_configs_of_commands_exist() -> None:
    """By path, and by name where `asr-downstream` takes one."""
    folders = {
        **dict.fromkeys(('train-det', 'test-det'), 'det_configs'),
        'train-diffusion': 'diffusion/configs',
        'train-cls': 'tools/cls_configs',
        **dict.fromkeys(('distill-far', 'prune-far'), 'tools/far_configs'),
    }
    named = 0
    for name, script, arguments in COMMANDS:
        for word in arguments:
            if word.startswith(FOLDERS) and word.endswith('.py'):
                assert (ROOT / word).is_file(), f'{name}: {word}'
        if script == 'asr-downstream' and len(arguments) > 1 and arguments[0] in folders:
            command, config = arguments[:2]
            if 'CONFIG' not in config and not config.startswith('-'):
                find_config(Path(config), folders[command])
                named += 1
    assert named > 3


@pytest.mark.det
def test_a_wrong_command_is_noticed() -> None:
    pytest.importorskip('mmdet')
    [(script, arguments)] = commands('python tools/results_det.py RUN [RUN ...] --output x  # a table')
    assert arguments == ['RUN', 'RUN', '--output', 'x']
    for wrong in (arguments, ['RUN', '--ou', 'x']):
        with pytest.raises(SystemExit):
            parse(script, wrong)


def test_make_targets_and_links_exist() -> None:
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'^make ([a-z-]+)|`make ([a-z-]+)`', TEXTS, re.MULTILINE):
        assert f'\n{"".join(target)}:' in makefile, target
    documents = {document.path: document for document in DOCUMENTS}
    lost = [
        f'{document.name}: {link}'
        for document in DOCUMENTS
        for link in document.links()
        if not leads_somewhere(document, link, documents)
    ]
    assert not lost, '\n'.join(lost)


def leads_somewhere(document: Document, link: str, documents: dict[Path, Document]) -> bool:
    path, _, anchor = link.partition('#')
    target = (document.path.parent / path).resolve() if path else document.path
    return target.exists() and (not anchor or anchor in documents[target].anchors())


def test_extras_in_documents_exist() -> None:
    extras = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    for names in re.findall(r"-e '\.\[([\w,]+)\]'", TEXTS):
        assert set(names.split(',')) <= set(extras), names


def test_the_readme_is_a_front_door() -> None:
    """It is short, and leads to every page of docs/."""
    assert len(README.splitlines()) <= 200
    for page in (ROOT / 'docs').glob('*.md'):
        assert f'(docs/{page.name}' in README, page.name


def texts_of(path: Path) -> Iterator[str]:
    """Strings of a program; what an f-string puts in is left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield '\0'.join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    """``...`` stands for what a message names."""
    files = [*(ROOT / 'asr_downstream').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]
    said = '\n'.join(text for path in files for text in texts_of(path))
    messages = re.findall(r'^\*\*`(.*)`\*\*$', (ROOT / 'docs/troubleshooting.md').read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in message.split('...'):
            assert part.strip(' :;(),') in said, f'{message}: {part!r}'
