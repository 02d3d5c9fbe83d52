"""What an export has to know of a kind of model: what it looks like when shipped, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from asr_downstream.commands.exporting.subject import Subject

__all__ = ['Kind', 'Request']


@dataclass(frozen=True)
class Request:
    """What is exported, and what it is compared on.

    Attributes:
        shipped: file or folder.
        data: images; None: random numbers.
        images: how many of them, at most.
        config: of a detector, instead of the one beside it.
        trust: see `asr_downstream.files.weights.read_checkpoint`.
    """

    shipped: Path
    data: Path | None = None
    images: int = 64
    config: Path | None = None
    trust: bool = False


class Kind:
    """A kind of model.

    Attributes:
        name: of the kind.
        shipped: what one looks like, for messages.
    """

    name: ClassVar[str]
    shipped: ClassVar[str]

    def is_shipped(self, path: Path) -> bool:
        """Whether a file or folder looks like a shipped model of this kind."""
        raise NotImplementedError

    def open(self, request: Request) -> Subject:
        """Read the model.

        Raises:
            AsrError: it cannot be read, or has gates.
        """
        raise NotImplementedError
