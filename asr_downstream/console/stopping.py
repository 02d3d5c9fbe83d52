"""Ctrl-C and termination as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ['StopSignal', 'Stopped', 'leave_stopping_to_the_parent', 'until_stopped']

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The program was told to stop.

    Args:
        number: signal that told it.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status by the convention of shells, 128 + signal: 130 after Ctrl-C, 143 after a termination."""
        return 128 + self.number


class StopSignal:
    """Inside the block, the first Ctrl-C or termination only sets ``is_set``; a Ctrl-C after it interrupts.

    A termination after it does nothing: a cluster signals every process, and its launcher passes it on once more. What
    does not stop in time is killed by them.

    Attributes:
        number: the first signal; None as long as there was none.
    """

    number: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether the program was told to stop."""
        return self.number is not None

    def __enter__(self) -> StopSignal:
        self.process = os.getpid()
        self.before = {}
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: Any) -> None:
        """Note the first one."""
        if os.getpid() != self.process:  # a forked process, before `obey_again`
            if number == signal.SIGTERM:
                obey_again()
                os.kill(os.getpid(), number)
            return
        if self.is_set and number == signal.SIGINT:
            raise Stopped(number)
        if self.is_set:
            return
        self.number = number
        with suppress(OSError):  # nobody may read it any more
            os.write(1, b'\nstopping, with a checkpoint; Ctrl-C stops at once\n')  # print may be in use

    def stopped(self) -> Stopped:
        """Make the exception that ends the program. A process that another one told to stop ends as after Ctrl-C."""
        return Stopped(signal.SIGINT if self.number is None else self.number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def until_stopped() -> Iterator[StopSignal]:
    """Let the block see a request to stop, and raise it where the block has come to its end all the same.

    A request may come when there is nothing left to stop: while the last checkpoint is written. The program that runs
    the block has more to do, such as the next training, and does not begin it.

    Raises:
        Stopped: the program was told to stop, and the block ended without an error.
    """
    with StopSignal() as stopping:
        yield stopping
    if stopping.is_set:
        raise stopping.stopped()


def obey_again() -> None:
    """Let a forked process end when it is terminated, as `multiprocessing.Pool` ends its workers and waits for them."""
    if handled():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def handled() -> bool:
    """Whether terminations are those of a `StopSignal`."""
    return isinstance(getattr(signal.getsignal(signal.SIGTERM), '__self__', None), StopSignal)


class Fork(threading.local):
    """Keeps terminations waiting while this thread forks.

    One that comes to a forked process before `obey_again` would be lost: Python forgets there which signals have come.
    """

    mask: set[Any] | None = None

    def begin(self) -> None:
        """Keep them waiting."""
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if handled() else None

    def end(self) -> None:
        """Let them through."""
        if self.mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
            self.mask = None

    def end_in_child(self) -> None:
        """Let them through, to a process that obeys them."""
        obey_again()
        self.end()


fork = Fork()
os.register_at_fork(before=fork.begin, after_in_parent=fork.end, after_in_child=fork.end_in_child)


def leave_stopping_to_the_parent(worker: int, then: Callable[[int], Any] | None = None) -> None:
    """Let a worker of a data loader live until its parent ends it; the ``worker_init_fn`` of a loader.

    Ctrl-C and most launchers signal the whole process group. A worker that dies of it takes the step of its parent
    along, before that can write a checkpoint. torch gives its workers a handler for terminations after the fork, so
    this has to be done in the worker. A termination by the parent, which exits and finds that a worker hangs, is
    obeyed; where the system does not tell who sent it, the second one is.

    Args:
        worker: number of the worker.
        then: another ``worker_init_fn`` to call.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if then is not None:
        then(worker)


def end_with(parent: int) -> None:
    """Wait for a termination that ``parent`` has sent, and end this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch does: the parent takes another status for a crash of the worker
