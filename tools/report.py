"""`asr-downstream report`, as a script of the checkout: python tools/report.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('report')

if __name__ == '__main__':
    cli.run(main)
