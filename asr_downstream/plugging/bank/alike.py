"""Which attentions are alike, so that those of many sites can be computed as one with a batch of parameters.

Alike are attentions of one class, with equal attributes all the way down and parameters of equal shapes. How they are
computed together is found by trying: an attention may say how itself (a method ``batched``), else `torch.vmap` runs
its forward over stacked parameters, and the result is taken only if it equals that of each by itself.
"""

from __future__ import annotations

import copy
import numbers
import threading
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from asr_downstream.attention.base import says_batched
from asr_downstream.plugging.gating.gates import ConstantGate
from asr_downstream.plugging.gating.site_attention import OwnAttention

__all__ = ['Form', 'Forms', 'batched_form', 'hooked', 'links', 'signature']

OF_MODULES = frozenset(nn.Module().__dict__)  # attributes that every module has
SIMPLE = (numbers.Number, str, bool, type(None), torch.dtype, torch.Size)
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
TOLERANCE = 1e-10  # of a trial in float64


class Form:
    """How the gates of a column are computed together.

    Args:
        attention: of one of the sites.
        said: it has a method ``batched``; else it is vmapped.

    Attributes:
        names: of the parameters that each site has of its own.
        chained: a state runs along the sites.
    """

    chained = False

    def __init__(self, attention: nn.Module, said: bool) -> None:
        self.names = [name for name, _ in attention.named_parameters()]
        self.said = said
        # Parameters of a module are swapped for the time of a call, so this has one of its own, for one thread at once.
        self.template = None if said else bare(attention, 'meta')
        self.lock = threading.Lock()

    def shared(self) -> list[Any]:
        """Parameters that are not of one site."""
        return []

    def modules(self) -> list[nn.Module]:
        """Modules that are not of one site."""
        return []

    def watched(self) -> bool:
        """Whether someone watches the states that run along the sites."""
        return False

    def covers(self, gates: list[ConstantGate]) -> bool:
        """Whether these gates can be computed without those of other sites."""
        return True

    def places(self, gate: ConstantGate) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters of a site lie, in the order of ``names``."""
        found = []
        for name in self.names:
            path, _, key = name.rpartition('.')
            found.append((gate.attention.get_submodule(path)._parameters, key))
        return found

    def __call__(self, gates: list[ConstantGate], parameters: dict[str, Tensor], psi: Tensor | None) -> Tensor:
        """Return the gates ``(sites, C)``.

        Args:
            gates: of the sites.
            parameters: stacks ``(sites, *shape)`` by name.
            psi: learned inputs ``(sites, 1, C)``; None for an attention without input.
        """
        return self.compute(gates[0].attention, gates[0].channels, parameters, psi)

    def compute(self, attention: Any, channels: int, parameters: dict[str, Tensor], psi: Tensor | None) -> Tensor:
        """See `__call__`; ``attention`` is any of the sites."""
        if self.said:
            return attention.batched(parameters, psi)
        x = next(iter(parameters.values())).new_zeros(1, channels) if psi is None else psi
        template: Any = self.template

        def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(template, parameters, (x,))

        with self.lock:
            return torch.vmap(of_one, in_dims=(0, None if psi is None else 0))(parameters, x).squeeze(1)


Forms: TypeAlias = dict[Hashable, Form | None]  # by signature


def batched_form(gate: ConstantGate) -> Form | None:
    """How the gates of sites that are like this one are computed together; None: each by itself."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return tried(gate)
    except Exception:  # whatever an attention does that a batch of parameters cannot
        return None


def tried(gate: ConstantGate) -> Form | None:
    """Compute two sites together and each by itself, in float64 and in both modes."""
    form = Form(gate.attention, says_batched(gate.attention))
    both = [bare(gate.attention, 'cpu').double() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for attention in both:
        for parameter in attention.parameters():
            parameter.normal_(generator=generator)
    psi = torch.randn(2, 1, gate.channels, dtype=torch.float64, generator=generator)
    stacks = {name: torch.stack([a.get_parameter(name) for a in both]) for name in form.names}
    results = []
    for mode in (True, False):
        for attention in (*both, *([form.template] if form.template is not None else [])):
            attention.train(mode)
        results.append(torch.cat([attention(x) for attention, x in zip(both, psi, strict=True)]))
        results.append(form.compute(both[0], gate.channels, stacks, None if gate.psi is None else psi))
    agree = all(r.shape == (2, gate.channels) and torch.allclose(r, results[0], TOLERANCE, TOLERANCE) for r in results)
    return form if agree else None


def bare(attention: nn.Module, device: str) -> nn.Module:
    """Copy an attention without its weights and hooks."""
    found = copy.deepcopy(attention).to_empty(device=device)
    for module in found.modules():
        for name in HOOKS:
            getattr(module, name).clear()
    return found


def signature(gate: ConstantGate) -> Hashable:
    """What gates must have in common to be computed together; None: what this one does, nobody can tell."""
    attention = gate.attention
    if not isinstance(gate.site_attention, OwnAttention) or any(True for _ in attention.buffers()):
        return None
    described: list[Any] = [gate.channels, gate.psi is None, gate.reference is None]
    for path, module in attention.named_modules():
        described.append((path, type(module)))
        for name, value in own(module):
            if (simple := frozen(value)) is None:
                return None
            described.append((name, simple))
        described += [(name, None if p is None else p.shape) for name, p in module._parameters.items()]
    return tuple(described)


def own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are not those of every module."""
    return ((name, value) for name, value in vars(module).items() if name not in OF_MODULES)


def frozen(value: Any) -> Any:
    """A hashable equal of a plain attribute; None of another one."""
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, type) or callable(value) and not isinstance(value, nn.Module):
        return value if isinstance(value, Hashable) else None
    if isinstance(value, tuple | list):
        items = tuple(map(frozen, value))
        return None if None in items else items
    return None


def links(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """What a plan relies on, as ``(dict, key, value)``: the children of modules, and their attributes."""
    for module in modules:
        for name, child in module._modules.items():
            yield module._modules, name, child
        for name, value in own(module):
            yield vars(module), name, value


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether someone watches one of these modules, who would see nothing if it did not run."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
