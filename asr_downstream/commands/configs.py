"""List the ready configs, which commands find by name.

    asr-downstream configs                  # all of them
    asr-downstream configs retinanet dia    # those whose paths contain all of these words
    asr-downstream configs --path digits    # where their files are

A command takes the name instead of a path: asr-downstream train-diffusion unet-w32_digits. Where two configs have one
name, give more of the path: digits/NAME. To change one, write a config whose _base_ is the path of the ready one.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from asr_downstream.console import cli
from asr_downstream.files.ready import ROOT, line_of, ready_configs

__all__ = ['main']

# Commands that take the configs of a folder.
TAKEN_BY = {
    'det_configs': 'train-det, test-det, fold',
    'diffusion/configs': 'train-diffusion',
    'tools/cls_configs': 'train-cls',
    'tools/far_configs': 'distill-far, prune-far',
}


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and print the list."""
    parser = cli.parser(__doc__, 'configs', names)
    parser.add_argument('words', nargs='*', metavar='WORD', help='parts of names, all of which should be there')
    parser.add_argument('--path', action='store_true', help='print the paths of the files')
    args = parser.parse_args(argv)

    shown = 0
    for folder, commands in TAKEN_BY.items():
        paths = [
            p
            for p in ready_configs(folder)
            if all(w.lower() in p.relative_to(ROOT).as_posix().lower() for w in args.words)
        ]
        shown += len(paths)
        if args.path:
            print(*paths, sep='\n', end='\n' if paths else '')
        elif paths:
            width = max(len(path.stem) for path in paths)
            room = max(40, shutil.get_terminal_size((140, 24)).columns - width - 4)
            print(f'{folder}: for {commands}')
            for path in paths:
                print(f'  {path.stem:{width}}  {textwrap.shorten(line_of(path), room, placeholder=" ...")}'.rstrip())
    if not shown:
        parser.error(f'no name of a ready config contains {" and ".join(args.words)}')
