"""Make the project's environment: a virtual environment with torch, mmcv's ops built against it, and this package.

    python3.11 tools/setup_env.py .venv

Needs Python >= 3.10, gcc and a package index; only the standard library. Each step is done once: a second call
continues where the first stopped, and the compiled mmcv wheel is kept in `.wheels/` for the next environment.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / 'constraints.txt'
NINJA = re.compile(r'^\s*\[(\d+)/(\d+)\]')


class StepFailed(Exception):
    """A step of the set-up failed; the message is for the user."""


class Setup:
    """The steps, their stamps and the log of one environment."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / 'bin' / 'python'
        self.log = venv / 'setup.log'
        self.stamps = venv / '.steps'
        self.interactive = sys.stdout.isatty()

    def pin(self, package: str) -> str:
        """Version of ``package`` in the constraints file, as a requirement."""
        for line in CONSTRAINTS.read_text().splitlines():
            if line.split('==')[0] == package:
                return line.split()[0]
        raise StepFailed(f'{CONSTRAINTS.name} does not pin {package}')

    def pip(self, *args: str) -> list[str]:
        """Command line of pip inside the environment, with the constraints."""
        return [str(self.python), '-m', 'pip', '--disable-pip-version-check', *args, '-c', str(CONSTRAINTS)]

    def run(self, title: str, command: list[str]) -> None:
        """Run a command with a progress line; its output goes to the log."""
        start = time.monotonic()
        shown = 0.0
        tail: list[str] = []
        with self.log.open('a') as log:
            log.write(f'\n$ {" ".join(command)}\n')
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail = [*tail[-11:], line.rstrip()]
                built = NINJA.match(line)
                seconds = time.monotonic() - start
                if self.interactive or (built and seconds - shown > 30):
                    shown = seconds
                    progress = f'{built[1]} of {built[2]} files' if built else ''
                    self.progress(f'{title} ... {progress} {seconds:.0f} s')
        if process.wait() != 0:
            raise StepFailed('\n'.join([*(f'    {line[:160]}' for line in tail), f'exit code {process.returncode}']))
        self.progress(f'{title}: done in {time.monotonic() - start:.0f} s', final=True)

    def progress(self, text: str, final: bool = False) -> None:
        """Print a line; on a terminal it replaces the one before."""
        if self.interactive:
            print(f'\r\033[K{text}', end='\n' if final else '', flush=True)
        else:
            print(text, flush=True)

    def once(self, name: str, fingerprint: str, work: Callable[[], None], advice: str) -> None:
        """Do a step unless its stamp says that it was done with this fingerprint."""
        stamp = self.stamps / name
        if stamp.exists() and stamp.read_text() == fingerprint:
            return
        try:
            work()
        except (StepFailed, OSError) as error:
            sys.exit(
                f'\nset-up failed at step "{name}":\n{error}\n\nWhat to do: {advice}\n'
                f'The whole output is in {self.log}. The same command continues from this step.'
            )
        self.stamps.mkdir(parents=True, exist_ok=True)
        stamp.write_text(fingerprint)


def make_wheel(setup: Setup, wheels: Path) -> None:
    """Compile mmcv's ops against the installed torch, unless the wheel is there."""
    if any(wheels.glob('onedl_mmcv-*.whl')):
        setup.progress(f'mmcv: reusing the wheel in {wheels.relative_to(ROOT)}', final=True)
        return
    building = wheels.with_name(wheels.name + '.tmp')
    building.mkdir(parents=True, exist_ok=True)
    options = ['--no-deps', '--no-build-isolation', '--verbose', '--wheel-dir', str(building)]
    setup.run('mmcv: compiling its ops (once, 6 to 15 minutes)', setup.pip('wheel', *options, setup.pin('onedl-mmcv')))
    wheels.mkdir(parents=True, exist_ok=True)
    for wheel in building.glob('*.whl'):
        wheel.replace(wheels / wheel.name)
    building.rmdir()


def main(venv: Path) -> None:
    """Run all steps that have not been run yet."""
    if sys.version_info < (3, 10):
        sys.exit(f'Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11')
    setup = Setup(venv)
    constraints = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    project = hashlib.sha256((ROOT / 'pyproject.toml').read_bytes()).hexdigest()
    network = 'check the network and the package index (pip config list), then run the same command again'

    def create() -> None:
        venv.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, '-m', 'venv', '--clear', str(venv)], check=False)
        if not setup.python.exists():
            raise StepFailed(f'{sys.executable} -m venv made no environment in {venv}')

    setup.once('environment', sys.version, create, 'install the venv module (Debian: apt-get install python3.11-venv)')
    setup.once(
        'torch',
        setup.pin('torch'),
        lambda: setup.run(
            'torch and build tools',
            setup.pip('install', setup.pin('torch'), 'numpy', 'ninja', 'wheel', 'packaging', 'psutil', 'setuptools'),
        ),
        network,
    )
    wheels = ROOT / '.wheels' / f'{setup.pin("torch").replace("==", "-")}-{sysconfig.get_python_version()}'
    setup.once(
        'mmcv wheel',
        f'{setup.pin("onedl-mmcv")} {setup.pin("torch")}',
        lambda: make_wheel(setup, wheels),
        'a C++ compiler is needed (Debian: apt-get install g++ python3-dev) and 3 GB of memory a job '
        '(export MAX_JOBS=1 if the compiler is killed)',
    )
    setup.once(
        'packages',
        constraints + project,
        lambda: setup.run(
            'packages', setup.pip('install', *map(str, wheels.glob('*.whl')), '--editable', '.[det,diffusion,far,dev]')
        ),
        network,
    )
    (venv / '.ready').touch()
    setup.progress(f'environment ready: {venv}', final=True)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
