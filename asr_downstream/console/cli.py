"""What command lines share: help, options, one line for an error, exit codes."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from asr_downstream.console.stopping import Stopped
from asr_downstream.errors import AsrError, OtherProcessError, notes

# What a loader puts before the error of its worker.
IN_WORKER = re.compile(r'^Caught \w+ in DataLoader worker.*^[\w.]+Error: ', re.MULTILINE | re.DOTALL)

__all__ = [
    'Names',
    'Options',
    'add_calibration',
    'add_launcher',
    'add_options',
    'add_sampling',
    'count',
    'ema',
    'finite',
    'number',
    'parser',
    'part',
    'run',
]

Names = Callable[[str], str]

# A worker's error arrives as its whole traceback, which also shows the source line with its {placeholder}.
UNREADABLE = re.compile(r'failed to load image: ([^\s{}]+)$', re.MULTILINE)


class Parser(argparse.ArgumentParser):
    """A parser that names commands in its help as they were called: `asr-downstream fold` or `python tools/fold.py`."""

    names: Names = staticmethod(str)

    def format_help(self) -> str:
        """Text of ``--help``."""
        return self.names(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        super().error(self.names(message))


def parser(doc: str | None, name: str | None = None, names: Names = str) -> Parser:
    """Make a parser whose ``--help`` is the docstring of a command: what it does, then examples.

    Args:
        doc: its first line says what the command does.
        name: of the command in the table of `asr-downstream`; a program of the checkout has none.
        names: turns names of commands in a text into those that were called, see `asr_downstream.commands.main`.
    """
    summary, _, rest = (doc or '').partition('\n')
    found = Parser(
        prog=names(f'asr-downstream {name}') if name else None,
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.names = names
    return found


class Options(argparse.Action):
    """MMEngine's `DictAction`, imported when it is used: ``--help`` needs no MMEngine."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Parse KEY=VALUE ..."""
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest)(parser, namespace, values)


def add_options(parser: argparse.ArgumentParser, text: str = 'override the config') -> None:
    """Add ``--cfg-options``."""
    parser.add_argument('--cfg-options', nargs='+', action=Options, metavar='KEY=VALUE', help=text)


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} should be a whole number of at least 1')
    return int(text)


def number(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} should be a whole number of at least 0')
    return int(text)


def finite(text: str) -> float:
    """Parse a number that is not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f'{text!r} should be a finite number')
    return value


def part(text: str) -> float:
    """Parse a number between 0 and 1, both left out."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} should be between 0 and 1, such as 0.8')
    return value


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Add the options of pushing to the hub."""
    parser.add_argument('--push-to-hub', metavar='REPO', help='also push it: USER/NAME on the Hugging Face hub')
    parser.add_argument('--private', action='store_true', help='a repository that is made is private')


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of calibrated folding."""
    parser.add_argument(
        '--calibrate', type=count, metavar='N', help='training images to average gates over, such as 64'
    )
    parser.add_argument(
        '--refine-norms', action='store_true', help='estimate batch norm statistics again over those images'
    )
    parser.add_argument(
        '--max-drop',
        type=float,
        metavar='AP',
        help='most AP in [0, 1] to lose; the least constant sites stay plugged until it holds',
    )


def add_sampling(parser: argparse.ArgumentParser, num_samples: int) -> None:
    """Add the options of generating images."""
    parser.add_argument('--num-samples', type=count, default=num_samples, help=f'images (default: {num_samples})')
    parser.add_argument(
        '--sampler',
        choices=['DDPM', 'DDIM', 'DPM-Solver++', 'Euler'],
        help='default: DDIM, of flow matching Euler; DDPM needs many steps, DPM-Solver++ few',
    )
    parser.add_argument(
        '--sampler-kwargs',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='of the scheduler in diffusers: thresholding=True (for pixels, not latents), use_karras_sigmas=True',
    )
    parser.add_argument('--steps', type=count, default=50, help='inference steps (default: 50)')
    parser.add_argument('--guidance-scale', type=finite, default=1.0, help='of conditioned models (default: 1, none)')
    parser.add_argument('--seed', type=int, default=0, help='of the images (default: 0)')
    parser.add_argument('--batch-size', type=count, default=64, help='images a forward (default: 64)')
    parser.add_argument('--weights', choices=['ema', 'raw'], help='default: the average, if the run has one')


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add the options of a launch of several processes, as MMDetection's tools have them."""
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='what started this process, if several'
    )
    parser.add_argument('--local-rank', '--local_rank', type=int, help='what some launchers pass; not used')


def ema(args: argparse.Namespace) -> bool | None:
    """Which weights `add_sampling` asks for: averaged, as trained, or (None) whatever the run has."""
    return None if args.weights is None else args.weights == 'ema'


def about(error: Exception) -> list[str]:
    """Notes of an error, in brackets: which part of a config it comes from."""
    return [f'({note})' for note in notes(error)]


def run(main: Callable[[Sequence[str] | None], None], names: Names = str) -> None:
    """Run the main function of a command; errors that a user can mend become one line and exit code 1.

    A program that was told to stop exits with 128 + the signal: 130 after Ctrl-C, 143 after a termination.
    ``ASR_DEBUG=1`` shows tracebacks. ``names`` turns names of commands in the line into those that were called.
    """
    try:
        main(None)
    except KeyboardInterrupt as interrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(interrupt.status if isinstance(interrupt, Stopped) else 130)
    except Exception as error:
        if os.environ.get('ASR_DEBUG'):
            raise
        if isinstance(error, OtherProcessError):
            sys.exit(1)
        unreadable = UNREADABLE.search(str(error))
        if unreadable:
            message = f'{unreadable[1]}: cannot be read as an image; replace it or take it out of the annotation file'
        elif isinstance(error, AsrError):
            message = ' '.join([*IN_WORKER.sub('', str(error)).split(), *about(error)])
        elif isinstance(error, PermissionError):
            message = f'{error.filename}: no permission to write or read; choose another folder'
        elif notes(error):  # of what a config names
            said = ' '.join(str(error).split())
            message = f'{type(error).__name__}: {said} {" ".join(about(error))}; ASR_DEBUG=1 shows where'
        else:
            raise
        print(f'error: {names(message)}', file=sys.stderr)
        sys.exit(1)
