"""`asr-downstream prune-far`, as a script of the checkout: python tools/prune_far.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('prune-far')

if __name__ == '__main__':
    cli.run(main)
