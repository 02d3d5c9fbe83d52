"""Run a command so that nothing of it outlives this program's parent: `guard.py [--low] COMMAND ...`.

stdin is a pipe from the parent. When it closes, because the parent is done with the command or has died of whatever,
all processes of the command are ended: also those that have left its process group, as the compilers of ninja have.
Signals are passed on to the process group; Ctrl-C on a terminal reaches the parent only. ``--low`` gives the command
what no other process wants of the processors and the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

GRACE = 10  # seconds between a termination and a kill
PR_SET_CHILD_SUBREAPER = 36

__all__ = ['descendants', 'main']


def adopt_orphans() -> None:
    """Become the parent of what the command leaves behind, where the system (Linux) knows this."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` has started, and those that these have started; those that have ended are left out."""
    children: dict[int, list[int]] = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = path.read_text().rpartition(')')[2].split()[:2]
            if state != 'Z':
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def end_all(child: subprocess.Popen[bytes]) -> None:
    """Terminate the command and what it has started, and kill what is still there after a while."""
    number, until = signal.SIGTERM, time.monotonic() + GRACE
    while child.poll() is None or descendants(os.getpid()):
        for pid in {child.pid, *descendants(os.getpid())}:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        again = time.monotonic() + 1
        while time.monotonic() < again and (child.poll() is None or descendants(os.getpid())):
            time.sleep(0.05)
        if time.monotonic() > until:
            number = signal.SIGKILL


def pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the process group, this process left out."""
    handler = signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)
    signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Run the command and return its exit status, 128 + the signal that ended it."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    command = argv
    if argv[0] == '--low':
        os.nice(19)
        command = [*(['ionice', '-c', '3'] if shutil.which('ionice') else []), *argv[1:]]
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], 0.1)[0]:  # nothing is ever written: it was closed
            break
    end_all(child)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
