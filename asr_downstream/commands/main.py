"""`asr-downstream COMMAND ...`: the table of commands, and the program that runs one of them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import asr_downstream
from asr_downstream.console import cli
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files import ready

__all__ = ['COMMANDS', 'main', 'program', 'script', 'to_commands', 'to_scripts']


class Command(NamedTuple):
    """A command of the program.

    Attributes:
        module: whose ``main(argv, names)`` it is, and whose docstring its help is.
        script: of the checkout that does the same; None if there is none.
        line: what it does.
    """

    module: str
    script: str | None
    line: str


COMMANDS = {
    'train-det': Command(
        'asr_downstream.detection.commands.train_det',
        'tools/train_det.py',
        'train a detector of MMDetection, stock or plugged',
    ),
    'test-det': Command(
        'asr_downstream.detection.commands.test_det',
        'tools/test_det.py',
        'evaluate a detector, and its folded self beside it',
    ),
    'predict': Command(
        'asr_downstream.detection.commands.predict',
        'tools/predict.py',
        'find objects in images: COCO JSON and pictures',
    ),
    'results-det': Command(
        'asr_downstream.detection.commands.results_det',
        'tools/results_det.py',
        'gather tested detectors in one table, mean and spread over seeds',
    ),
    'prepare-data': Command(
        'asr_downstream.detection.commands.prepare_data',
        'tools/prepare_data.py',
        'make, check or convert data of detection',
    ),
    'train-diffusion': Command(
        'asr_downstream.diffusion.commands.train_diffusion',
        'diffusion/train.py',
        'train a diffusion model of diffusers, stock or plugged',
    ),
    'sample': Command(
        'asr_downstream.diffusion.commands.sample',
        'diffusion/sample.py',
        'generate images with a trained diffusion model',
    ),
    'evaluate': Command(
        'asr_downstream.diffusion.commands.evaluate',
        'diffusion/evaluate.py',
        'FID, KID, speed and cost of diffusion models, and of their folded selves',
    ),
    'compare': Command(
        'asr_downstream.diffusion.commands.compare',
        'diffusion/compare.py',
        'curves and samples of several diffusion models side by side',
    ),
    'train-cls': Command(
        'asr_downstream.classification.commands.train_cls',
        'tools/train_cls.py',
        'train an image classifier, stock or plugged, fold it, ship it',
    ),
    'distill-far': Command(
        'asr_downstream.far.commands.distill_far',
        'tools/distill_far.py',
        'replace self-attention by multi-head LSTMs, and distil them',
    ),
    'prune-far': Command(
        'asr_downstream.far.commands.prune_far',
        'tools/prune_far.py',
        'prune the hidden units of a distilled model: a family of smaller ones',
    ),
    'evaluate-far': Command(
        'asr_downstream.far.commands.evaluate_far',
        'tools/evaluate_far.py',
        'compare a teacher with its distilled and pruned models',
    ),
    'ablate': Command(
        'asr_downstream.commands.ablate',
        'tools/ablate.py',
        'train arms over seeds, and say with intervals whether an attention helps',
    ),
    'report': Command(
        'asr_downstream.commands.report',
        'tools/report.py',
        'write one HTML file about runs: verdicts, curves, pictures, provenance',
    ),
    'analyze': Command(
        'asr_downstream.commands.analyze',
        'tools/analyze.py',
        'measure gates, their correlation, noise and cost of trained models',
    ),
    'fold': Command(
        'asr_downstream.commands.fold',
        'tools/fold.py',
        'turn a trained detector or diffusion model into the stock model',
    ),
    'export': Command(
        'asr_downstream.commands.export',
        'tools/export.py',
        'write a folded model as ONNX or torch.export, with a receipt',
    ),
    'gates': Command(
        'asr_downstream.commands.gates', None, 'save what gates have learnt as an adapter, and apply it to a base'
    ),
    'build-ops': Command(
        'asr_downstream.commands.build_ops', None, 'compile the operator that makes LSTMs fast on the CPU'
    ),
    'configs': Command('asr_downstream.commands.configs', None, 'list the ready configs, which are found by name'),
}
SCRIPTS = {command.script: name for name, command in COMMANDS.items() if command.script}
SCRIPT = re.compile(rf'(?:python )?\b({"|".join(map(re.escape, SCRIPTS))})')
CALLED = re.compile(rf'\basr-downstream ({"|".join(COMMANDS)})(?![\w-])')


def to_commands(text: str) -> str:
    """Name commands as those of the program: ``tools/fold.py`` becomes ``asr-downstream fold``."""
    if ready.ROOT.name == '_configs':  # a wheel has neither constraints.txt nor a folder to install
        text = re.sub(r"-e '\.\[(\w+)\]'", r"'asr-downstream[\1]'", text.replace('-c constraints.txt ', ''))
    return SCRIPT.sub(lambda found: f'asr-downstream {SCRIPTS[found[1]]}', text)


def to_scripts(text: str) -> str:
    """Name commands as scripts of the checkout: ``asr-downstream fold`` becomes ``python tools/fold.py``."""
    return CALLED.sub(
        lambda found: f'python {COMMANDS[found[1]].script}' if COMMANDS[found[1]].script else found[0], text
    )


def script(name: str) -> Callable[[Sequence[str] | None], None]:
    """Make the main function of the script of a command."""

    def run(argv: Sequence[str] | None = None) -> None:
        import_module(COMMANDS[name].module).main(argv, to_scripts)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names; the others are its own.

    Raises:
        AsrError: there is no such command.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {command.line}' for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog='asr-downstream',
        usage='asr-downstream COMMAND ...',
        description='Train with an attention, ship the stock model.',
        epilog='\n'.join(['commands:', *lines, '', 'asr-downstream train-diffusion unet-w32-asr-se_digits --dry-run',
                          'asr-downstream COMMAND --help has the options and examples of a command.']),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('command', nargs='?', help='one of those below', metavar='COMMAND')
    parser.add_argument('--version', action='version', version=f'asr-downstream {asr_downstream.__version__}')
    name = parser.parse_args(words[:1]).command
    if name is None:
        parser.print_help()
    elif name not in COMMANDS:
        raise AsrError(f'{name!r} is no command of asr-downstream; {did_you_mean(name, COMMANDS)}')
    else:
        import_module(COMMANDS[name].module).main(words[1:], to_commands)


def program() -> None:
    """Run `main` as a program: errors in one line, exit codes."""
    cli.run(main, to_commands)
