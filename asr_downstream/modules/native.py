"""Channel attention that models of other libraries have by themselves. Data, not code.

`Native` says of a class of blocks, such as the squeeze-and-excitation of EfficientNet, which of its modules computes
the gates and which axis of its input they multiply. The classes of MMDetection, transformers, torchvision and timm are
data, ``NATIVE`` in the modules of `asr_downstream.registry.FRAMEWORKS`; `register_native` adds others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from asr_downstream.errors import FoldError
from asr_downstream.registry import FRAMEWORKS, framework_data

__all__ = ['Native', 'known_natives', 'native_of', 'register_native']


@dataclass(frozen=True)
class Native:
    """A class of blocks that compute ``input * gates``, gates of one image and channel each.

    Attributes:
        gate: path of the module in the block whose output is the gates: ``(B, C)`` with axes of size 1 anywhere.
        axis: axis of the input that has the channels.
    """

    gate: str
    axis: int = 1


NATIVE: dict[str, Native] = {}  # entries of `register_native`, by qualified name; they win over those of adapters


def register_native(block: type[nn.Module] | str, gate: str, axis: int = 1) -> None:
    """Say what the gates of a class of attention blocks are, so that `asr_downstream.fold_native` can remove them.

        register_native(MyBlock, 'excite.3')  # MyBlock()(x) == x * gates, and its excite[3] returns the gates

    Args:
        block: the class, or its qualified name such as ``'mypackage.blocks.MyBlock'``; subclasses are meant, too.
        gate: path of the module in it whose output is the gates.
        axis: axis of the input that has the channels.

    Raises:
        FoldError: these are no class, no path or no number.
    """
    if not isinstance(block, type | str) or not isinstance(gate, str) or not gate or type(axis) is not int:
        raise FoldError(
            f'register_native({block!r}, {gate!r}, {axis!r}): expected a class of blocks or its qualified name, the '
            f"path of the module in it that returns the gates, and an axis, as in register_native(MyBlock, 'sigmoid')"
        )
    NATIVE[block if isinstance(block, str) else qualified_name(block)] = Native(gate, axis)


def qualified_name(cls: type) -> str:
    """Return ``'module.Class'``."""
    return f'{cls.__module__}.{cls.__qualname__}'


def native_of(module: nn.Module) -> Native | None:
    """Entry of the class of a module, or of its nearest base; None: it is no attention that is known."""
    for cls in type(module).__mro__:
        name = qualified_name(cls)
        if name in NATIVE:
            return NATIVE[name]
        if location := FRAMEWORKS.get(name.partition('.')[0]):
            found: Native | None = getattr(framework_data(location), 'NATIVE', {}).get(name)
            if found is not None:
                return found
    return None


def known_natives() -> dict[str, Native]:
    """All entries, those of the adapters first."""
    found: dict[str, Native] = {}
    for location in dict.fromkeys(FRAMEWORKS.values()):
        found.update(getattr(framework_data(location), 'NATIVE', {}))
    return {**found, **NATIVE}
