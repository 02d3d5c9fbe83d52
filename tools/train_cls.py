"""`asr-downstream train-cls`, as a script of the checkout: python tools/train_cls.py --help."""

from __future__ import annotations

from asr_downstream.commands.main import script
from asr_downstream.console import cli

main = script('train-cls')

if __name__ == '__main__':
    cli.run(main)
