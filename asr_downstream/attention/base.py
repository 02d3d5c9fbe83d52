"""The base class of attentions, and functions that several of them use.

An attention maps a descriptor ``(B, C)`` or a feature map ``(B, C, *)`` to gates ``(B, C)``. Any ``nn.Module`` whose
constructor takes ``channels`` can be registered; deriving from `ChannelAttention` only adds the optional parts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from asr_downstream.errors import PlugError

__all__ = ['ChannelAttention', 'gates_of_mean', 'hidden_width', 'is_norm', 'pool', 'said_with', 'says_batched']

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class ChannelAttention(nn.Module):
    """Base class of the attentions in this package.

    Attributes:
        uses_input: False for a control whose gates are parameters (LayerScale): its gates are constant by themselves,
            so no psi is learned for it and it always folds.
        on_learned_input: constructor arguments that apply when the input is a learned vector psi (plug ``ASR``), which
            has one position and a batch of one. They may be overridden in the spec.
        confined: the gates lie in (0, 1), as those of a sigmoid do; False for free scales (LayerScale).
        of_mean: the gates depend on a map only through its mean over the positions: ``self(x) == self(pool(x))``. The
            mean may then be computed in another way (`asr_downstream.plugging.kernels.gated_batch_norm`).
        batched: optional, a method ``batched(parameters, psi) -> gates (sites, C)`` for many sites at once on learned
            inputs: parameters by name, stacked ``(sites, *shape)``, and psi ``(sites, 1, C)``, None for an attention
            without input. In few operators what `torch.vmap` does, which runs where this is missing.
        recurrent: has ``step(y, state) -> (gates, state)``, which carries a state along the sites that share it.
    """

    uses_input: ClassVar[bool] = True
    confined: ClassVar[bool] = True
    of_mean: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    on_learned_input: ClassVar[dict[str, Any]] = {}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def start_constant(self) -> None:
        """Zero the last layer, so that the first gates are the same for every input (``preserve=True``)."""
        raise PlugError(f'{type(self).__name__} does not define start_constant(), which preserve=True needs')


def pool(x: Tensor) -> Tensor:
    """Global average pooling: ``(B, C, *)`` or ``(B, C)`` -> ``(B, C)``."""
    return x.flatten(2).mean(-1) if x.dim() > 2 else x


def hidden_width(channels: int, reduction: int) -> int:
    """Width of a bottleneck: ``channels // reduction``, at least 1 (the official code's rounding gives 0 at C <= 8).

    Raises:
        PlugError: the reduction is below 1.
    """
    if reduction < 1:
        raise PlugError(f'reduction={reduction!r} should be at least 1')
    return max(channels // reduction, 1)


def is_norm(module: nn.Module) -> bool:
    """Whether a module of an attention normalises; such a module is never shared: each site has its statistics."""
    return isinstance(module, NORMS) or getattr(module, 'normalises', False)


def gates_of_mean(attention: nn.Module) -> bool:
    """Whether ``of_mean`` holds: said by the class that defines ``forward``, or by one derived from it."""
    return bool(said_with('forward', attention, 'of_mean'))


def says_batched(attention: nn.Module) -> bool:
    """Whether there is a method ``batched``, of the class that defines ``forward``, or of one derived from it."""
    return said_with('forward', attention, 'batched') is not None


def said_with(method: str, attention: nn.Module, name: str) -> Any:
    """An attribute of a class that speaks of a method of it; None where a derived class has replaced the method."""
    for cls in type(attention).__mro__:
        if name in vars(cls):
            return vars(cls)[name]
        if method in vars(cls):
            return None
    return None
