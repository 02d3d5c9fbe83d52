"""Make the project's environment, and run the demo or the tests in it as soon as they can run.

    python3.11 tools/setup_env.py .venv                  # the whole environment
    python3.11 tools/setup_env.py .venv setup far        # what a part needs
    python3.11 tools/setup_env.py .venv demo             # or quality, test, docs
    python3.11 tools/setup_env.py .venv demo diffusion far

Needs Python >= 3.10, gcc for detection, and a package index; only the standard library. Each step is done once: a
second call continues where the first stopped. mmcv's ops compile at low priority beside everything that needs no mmcv;
their wheel is kept in ``$ASR_CACHE``, or ``~/.cache/asr-downstream``, for the next environment. ``MMCV_LINKS`` is a
page of ready wheels: see docs/install.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(f'Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11')

from environment.goals import GOALS, PARTS, reach
from environment.mmcv import provide_wheel
from environment.steps import Setup, Step, StepFailed

NETWORK = 'check the network and the package index (pip config list), then run the same command again'
COMPILER = (
    'a C++ compiler is needed (Debian: apt-get install g++ python3-dev) and 2 GB of memory a job (export MAX_JOBS=1 if '
    'the compiler is killed); if the download failed, check the network and the package index (pip config list); '
    'what needs no mmcv: make demo PART="diffusion far"'
)
# Modules are compiled when they are first imported: most of them never are, and pip takes half of its time for that.
PIP = ('{python}', '-m', 'pip', '--disable-pip-version-check', 'install', '--no-compile', '-c', '{constraints}')
FILES = ('constraints.txt', 'pyproject.toml')
NAME = 'asr-downstream'


def create(setup: Setup, step: Step) -> None:
    """Make the virtual environment."""
    setup.venv.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, '-m', 'venv', '--clear', str(setup.venv)], capture_output=True, text=True, check=False
    )
    if not setup.python.exists():
        raise StepFailed(f'{sys.executable} -m venv made no environment in {setup.venv}\n{done.stdout}{done.stderr}')


def extra(name: str, step: str | None = None) -> Step:
    """Step that installs what one of this package's extras needs."""
    command = (*PIP, f'{NAME}[{name}]')
    return Step(step or name, ('package',), command, NETWORK, title=f'packages of {step or name}', files=FILES)


# In the order in which they are done. A step of your own: its name, what it needs, its command, what to do if it fails.
STEPS = {
    step.name: step
    for step in (
        Step('environment', (), create, 'install the venv module (Debian: apt-get install python3.11-venv)'),
        Step(
            'torch',
            ('environment',),
            (*PIP, '{torch}', 'numpy', 'ninja', 'wheel', 'packaging', 'psutil', 'setuptools>=77'),
            NETWORK,
            title='torch and build tools',
            pins=('torch',),
        ),
        Step(
            'package',
            ('torch',),
            (*PIP, '--no-deps', '--no-build-isolation', '--editable', '.'),
            NETWORK,
            title='this package',
            files=FILES,
        ),
        Step('mmcv', ('torch',), provide_wheel, COMPILER, title="mmcv's ops", pins=('onedl-mmcv',), beside=True),
        extra('diffusion'),
        extra('far'),
        Step(
            'operator',
            ('far',),
            ('{python}', '-m', 'asr_downstream', 'build-ops'),
            'install a C++ compiler (Debian: apt-get install g++); without the operator FAR is slower on the CPU',
            title='operator of the LSTMs',
            files=tuple(f'asr_downstream/far/model/ops/lstm.{kind}' for kind in ('cpp', 'h')),
            optional=True,
        ),
        extra('export'),
        extra('dev'),
        Step(
            'detection',
            ('package', 'mmcv'),
            (*PIP, '{wheel}', f'{NAME}[det]'),
            NETWORK,
            title='packages of detection',
            files=FILES,
        ),
        extra('docs'),
    )
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, set up, run, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('venv', type=Path, help='folder of the environment')
    parser.add_argument('goal', nargs='?', default='setup', choices=list(GOALS), help='default: setup')
    parser.add_argument('part', nargs='*', help=f'of setup and demo: {", ".join(PARTS)} (default: all)')
    args = parser.parse_args(argv)
    parts = GOALS[args.goal].parts
    unknown = [name for name in args.part if name not in parts or args.goal not in ('setup', 'demo')]
    if unknown:
        parser.error(f'no part {unknown[0]!r} of {args.goal}: the parts of the demo are {", ".join(PARTS)}')
    setup = Setup(args.venv.resolve(), STEPS)
    return reach(setup, GOALS[args.goal], [name for name in parts if name in (args.part or parts)])


if __name__ == '__main__':
    sys.exit(main())
