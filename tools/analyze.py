"""`asr-downstream analyze`, as a script of the checkout: python tools/analyze.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('analyze')

if __name__ == '__main__':
    cli.run(main)
