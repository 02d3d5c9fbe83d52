"""Layers of a framework that go on after the layer of torch: a batch norm with its activation inside, as timm's is.

The gates scale what the layer of torch gives; what follows it reads the scaled output. Which modules follow is data of
the adapter: ``THEN`` in a module of `asr_downstream.registry.FRAMEWORKS`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from asr_downstream.registry import FRAMEWORKS, framework_data

__all__ = ['Followed', 'followers']


class Followed:
    """Mixin of a plugged layer. ``then``: names of the modules inside it that are applied to its output, in order."""

    then: ClassVar[tuple[str, ...]]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The plugged layer, and what follows."""
        y = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        for name in self.then:
            if (step := getattr(self, name, None)) is not None:
                y = step(y)
        return y


def followers(stock: type[nn.Module]) -> tuple[str, ...]:
    """Names of the modules that a stock layer applies to its own output; none, unless an adapter says so."""
    location = FRAMEWORKS.get(stock.__module__.partition('.')[0])
    if location is None:
        return ()
    then: dict[str, tuple[str, ...]] = getattr(framework_data(location), 'THEN', {})
    return then.get(f'{stock.__module__}.{stock.__qualname__}', ())
