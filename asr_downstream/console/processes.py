"""Work that the processes of a launch share: each does a part, and the first one has the results, in their order.

    processes = Processes.of_launch()
    images = processes.shared(draw, processes.own(batches), len(batches), 'drawing')   # on the first; [] on the others
    processes.first(lambda: save(images))

Item k of all is done by process k modulo their number. What is an item, such as one batch of images, decides whether
several processes compute what one computes, bit for bit: batches stay whole, and in them the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import torch.distributed as dist

from asr_downstream.console.progress import bar
from asr_downstream.errors import AsrError, OtherProcessError

__all__ = ['ALONE', 'Processes', 'end_processes']

T = TypeVar('T')
R = TypeVar('R')


@dataclass(frozen=True)
class Processes:
    """The processes of a launch.

    Attributes:
        index: of this one.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls) -> Processes:
        """Those of torch's process group; without one this process is alone."""
        if not dist.is_available() or not dist.is_initialized():
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this one has the results, prints and writes."""
        return self.index == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Part of this process."""
        return items[self.index :: self.count]

    def together(self, work: Callable[[], R]) -> R:
        """Call ``work`` on every process, and return its result; what fails on one fails on all, and is said by one.

        The work may itself be shared: a process that fails in it is met by the others at their next meeting.

        Raises:
            OtherProcessError: it failed elsewhere.
        """
        if self.count == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if getattr(error, 'is_known', False):  # from a meeting inside
                raise
            failure = error
        flags: list[Any] = [None] * self.count
        with self.meeting():
            dist.all_gather_object(flags, failure is not None)
        if any(flags):
            where = flags.index(True)
            if failure is None or where != self.index:
                raise known(OtherProcessError(f'process {where} failed; it says why')) from failure
            raise known(failure)
        return cast(R, result)

    def first(self, work: Callable[[], R]) -> R:
        """Result of what the first process does alone, on every process; the others wait.

        Raises:
            OtherProcessError: it failed.
        """
        result = self.together(lambda: work() if self.is_first else None)
        if self.count > 1:
            box = [result]
            with self.meeting():
                dist.broadcast_object_list(box, 0)
            result = box[0]
        return cast(R, result)

    def shared(self, work: Callable[[T], R], own: Iterable[T], total: int, text: str = '', every: int = 1) -> list[R]:
        """Do every item once.

        Args:
            work: called with an item; its result is sent to the first process, tensors should be on the CPU.
            own: items of this process, see `own`.
            total: number of items of all processes.
            text: of the progress bar of the first process; without it there is none.
            every: items of a process between two meetings, where results and failures are exchanged.

        Returns:
            Results of all items, in their order, on the first process; on the others none.

        Raises:
            OtherProcessError: an item failed on another process.
        """
        left = iter(bar(own, text) if text and self.is_first else own)
        found: list[R] = []
        for _ in range(0, total, every * self.count):
            found += self.gathered(self.together(lambda: [work(item) for item in islice(left, every)]))
        for _ in left:  # lets the bar say that it is done
            pass
        return found

    def gathered(self, results: list[R]) -> list[R]:
        """Results of all processes on the first, which had their items in turn."""
        if self.count == 1:
            return results
        parts: list[list[R]] = [[] for _ in range(self.count)]
        with self.meeting():
            dist.gather_object(results, parts if self.is_first else None)
        return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Turn what back ends say of a process that is gone into one line.

        Raises:
            AsrError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            said = ' '.join(str(error).split())[:160]
            raise known(AsrError(f'process {self.index}: another process of this launch has ended ({said})')) from error


def known(error: Exception) -> Exception:
    """Mark an error that all processes know of: none is waiting to hear of it."""
    error.is_known = True  # type: ignore[attr-defined]
    return error


ALONE = Processes()


def end_processes() -> None:
    """Close the process group, after the last training or other work of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
