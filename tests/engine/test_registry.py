"""One builder for all that configs name: what does not fit the signature is said, what a constructor raises is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from asr_downstream.console import cli
from asr_downstream.errors import AsrError, DataError, PlugError, add_note, notes
from asr_downstream.registry import Registry, build, check_arguments, find

THINGS = Registry('thing', error=DataError)
PARTS = Registry('part', error=AsrError, key='data')


@THINGS.register_module()
class Plain:
    def __init__(self, width: int, name: str = 'a') -> None:
        if width > 99:
            raise ZeroDivisionError('width over 99')
        self.width, self.name = width, name


@PARTS.register_module(name='Fussy')
@THINGS.register_module()
class Fussy:
    def __init__(self, source: Any, depth: int = 1) -> None:
        self.source, self.depth = source, depth
        raise TypeError('unsupported operand')


@THINGS.register_module()
def positional(a: int, /, b: int = 0) -> int:
    return a + b


def test_a_spec_becomes_an_object_and_its_keys_win() -> None:
    made = build(THINGS, dict(type='Plain', name='b'), width=3, name='c')
    assert (made.width, made.name) == (3, 'b')


@pytest.mark.parametrize(
    ('registry', 'spec', 'message'),
    [
        (THINGS, None, "thing: expected a dict like dict(type='...'), got None"),
        (PARTS, dict(depth=1), "data: expected a dict like dict(type='...'), got {'depth': 1}"),
        (THINGS, dict(type='Plane'), "unknown thing 'Plane': did you mean 'Plain'?"),
        (PARTS, dict(type='Fusy'), "data: type='Fusy' is not known; did you mean 'Fussy'?"),
        (THINGS, dict(type='Plain'), "thing 'Plain' needs 'width'; add width=..."),
        (THINGS, dict(type='Plain', width=1, wide=2), "thing 'Plain' takes no 'wide'; did you mean 'width'?"),
        (THINGS, dict(type='Plain', width='1'), "thing 'Plain': width='1' should be a whole number"),
        (PARTS, dict(type='Fussy', depth=True), 'data: depth=True should be a whole number'),
        (PARTS, dict(type='Fussy', source=1), "data: Fussy takes no 'source'"),
        (THINGS, dict(type='positional', a=1), "thing 'positional' does not take these arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_does_not_fit_is_an_error_of_the_registry(registry: Registry, spec: Any, message: str) -> None:
    with pytest.raises(registry.error) as caught:
        build(registry, spec, {'source': None} if registry is PARTS else {})
    assert type(caught.value) is registry.error
    assert str(caught.value).startswith(message)


def test_an_error_of_a_constructor_keeps_type_and_message_and_names_the_spec() -> None:
    with pytest.raises(ZeroDivisionError, match='width over 99') as caught:
        build(THINGS, dict(type='Plain', width=100))
    assert notes(caught.value) == ["in thing 'Plain', arguments {'width': 100}"]
    with pytest.raises(TypeError, match='unsupported operand') as other:
        build(PARTS, dict(type='Fussy', depth=2), {'source': object()})
    assert notes(other.value) == ["in data: Fussy, arguments {'depth': 2}"]


def test_an_error_that_names_what_was_built_needs_no_note() -> None:
    @THINGS.register_module(name='Speaking')
    def speaking() -> None:
        raise PlugError('Speaking: no')

    with pytest.raises(PlugError) as caught:
        build(THINGS, dict(type='Speaking'))
    assert notes(caught.value) == []


def test_arguments_alone_may_be_incomplete() -> None:
    check_arguments('thing', Plain, {'name': 'x'})
    with pytest.raises(AsrError, match="thing needs 'width'"):
        check_arguments('thing', Plain, {'name': 'x'}, given=())


def test_the_names_of_a_registry_are_looked_up() -> None:
    assert find(THINGS, 'Plain') is Plain
    with pytest.raises(DataError, match='unknown thing None'):
        find(THINGS, None)


def test_a_tool_ends_in_one_line_that_names_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Any) -> None:
        build(THINGS, dict(type='Plain', width=100))

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ZeroDivisionError: width over 99 (in thing 'Plain', arguments {'width': 100})")
    assert said.count('\n') == 1


def test_an_error_without_a_note_is_a_traceback() -> None:
    def main(argv: Any) -> None:
        raise ZeroDivisionError('a fault')

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


def test_notes_are_those_of_python() -> None:
    code = (
        'from asr_downstream.errors import add_note\n'
        'error = ValueError("a")\nadd_note(error, "said with it")\nadd_note(error, "and this")\nraise error'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, env=os.environ)
    if sys.version_info >= (3, 11):
        assert done.stderr.endswith('ValueError: a\nsaid with it\nand this\n')
    error = ValueError('a')
    add_note(error, 'b')
    assert notes(error) == ['b']
