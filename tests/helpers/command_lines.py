"""Command lines of documents and help texts, parsed by the tools themselves."""

from __future__ import annotations

import argparse
import importlib.util
import sys

import pytest
from conftest import ROOT

from asr_downstream.commands.main import COMMANDS as CONSOLE

__all__ = ['Parsed', 'parse']


class Parsed(Exception):
    """The arguments were accepted."""


def parse(script: str, arguments: list[str]) -> None:
    """Let a tool parse its arguments, and stop it there.

    Raises:
        SystemExit: the tool refuses the arguments.
    """
    if script == 'asr-downstream':
        spec = importlib.util.find_spec(CONSOLE[arguments[0]].module)
        arguments = arguments[1:]
    else:
        spec = importlib.util.spec_from_file_location('tool', ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = [*sys.path]
    with pytest.MonkeyPatch.context() as patch:
        original = argparse.ArgumentParser.parse_args

        def parse_args(self: argparse.ArgumentParser, argv: object = None, namespace: object = None) -> None:
            original(self, argv, namespace)
            raise Parsed

        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        patch.setattr(argparse.ArgumentParser, '_get_option_tuples', lambda self, text: [])  # no abbreviations
        patch.setitem(sys.modules, 'stock_only', argparse)  # it would refuse the package in this process
        spec.loader.exec_module(module)
        with pytest.raises(Parsed):
            module.main(arguments)
    sys.path[:] = path
