"""Passes of a model over data: what a batch is, how the model takes it, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from asr_downstream.console.progress import bar
from asr_downstream.errors import AsrError, DataError
from asr_downstream.folding.verify import run
from asr_downstream.modules.copies import batch_of

__all__ = ['Step', 'default_step', 'passes']

Step: TypeAlias = Callable[[nn.Module, Any], Any]


def default_step(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tensor, a list or tuple of arguments, or a dict of keyword arguments."""
    return run(model, tuple(batch) if isinstance(batch, list) else batch)


def passes(
    model: nn.Module,
    data: Iterable[Any],
    step: Step,
    text: str,
    error: type[AsrError] = DataError,
    option: str = '',
) -> Iterator[Any]:
    """Run a model over data, with a progress bar.

    Args:
        model: called in the mode that it is in, with or without gradients as the caller has it.
        data: batches; the model gets copies.
        step: runs the model on a batch.
        text: what the progress line says.
        error: what is raised.
        option: what was given, at the start of messages: ``'calibrate: '``.

    Yields:
        A batch that the model has just seen.

    Raises:
        AsrError: of type ``error``: there is no data, or the model does not take it.
    """
    seen = False
    for batch in bar(data, text):
        try:
            step(model, batch_of(batch))
        except TypeError as cause:
            first = str(cause).strip().splitlines()[0]
            raise error(
                f'{option}{type(model).__name__} cannot be called with this {type(batch).__name__} ({first}); say how '
                f'with step=lambda model, batch: model(...)'
            ) from cause
        seen = True
        yield batch
    if not seen:
        raise error(f'{option}there was no data; give a list or a loader of batches')
