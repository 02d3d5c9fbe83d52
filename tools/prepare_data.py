"""`asr-downstream prepare-data`, as a script of the checkout: python tools/prepare_data.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('prepare-data')

if __name__ == '__main__':
    cli.run(main)
