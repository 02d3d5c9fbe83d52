"""What is exported: a stock model, how it is called, and what may vary from call to call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError
from asr_downstream.modules.leaves import leaves
from asr_downstream.plugging.describe import describe

__all__ = ['Axes', 'Outputs', 'Subject', 'refuse_gates']

# Input -> axis -> (name, what it is a multiple of): ``{'image': {0: ('batch', 1), 2: ('height', 32)}}``.
Axes: TypeAlias = Mapping[str, Mapping[int, tuple[str, int]]]


class Outputs(nn.Module):
    """A model whose outputs are a flat dict of tensors with plain names, as files of other programs name them.

    Args:
        model: the model.
        call: runs it: ``call(model, **inputs)``.
        inputs: names of the inputs; tracing wants them to have some.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], inputs: Iterable[str]) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.train(False)
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]

        def forward(**inputs: Tensor) -> dict[str, Tensor]:
            return self.run(**inputs)

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Call the model."""
        found = leaves(self.call(self.model, **inputs), '')
        return {re.sub(r'\W+', '_', place).strip('_') or 'output': leaf for place, leaf in found}


@dataclass
class Subject:
    """A model to export.

    Attributes:
        kind: of model, in the table of kinds.
        name: of its class.
        model: what is traced.
        calls: inputs by name, of real images; the first is traced, so its batch should have two.
        axes: what may vary, the most first; what does not trace is tried with the next.
        sources: files that it was read from.
        data: where the inputs are from.
        score: measures a model on the same data: what is given to it is called as ``model`` is.
        whole: adds a file that takes images as they are, see `asr_downstream.commands.exporting.whole`.
        infer: name of the program that goes beside the files, and what it has to know; None: there is none.
        about: further facts for the receipt.
    """

    kind: str
    name: str
    model: Outputs
    calls: list[dict[str, Tensor]]
    axes: tuple[Axes, ...]
    sources: tuple[Path, ...]
    data: str = 'random numbers'
    score: Callable[[nn.Module, str], dict[str, float]] | None = None
    whole: Any = None
    infer: tuple[str, dict[str, Any]] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def names(self) -> list[str]:
        """Names of the outputs, in order."""
        return list(self.model(**self.calls[0]))


def refuse_gates(model: nn.Module, what: object, how: str) -> None:
    """Refuse a model that still has gates.

    Args:
        model: the model.
        what: was it read from.
        how: command that folds it.

    Raises:
        AsrError: see above.
    """
    sites = describe(model).sites
    if sites:
        raise AsrError(
            f'{what}: the {type(model).__name__} has gates at {len(sites)} sites, such as {sites[0].path}; what is '
            f'exported is the stock model: {how}'
        )
