"""`asr-downstream export`, as a script of the checkout: python tools/export.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('export')

if __name__ == '__main__':
    cli.run(main)
