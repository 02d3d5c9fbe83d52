"""Launches: how many operators a call dispatches, which on a GPU is how many kernels it starts.

Small models spend their time there on launches and not on arithmetic, and a count is the same on every machine.

A launch is an operator that reaches a backend, with views left out: views, and what only describes or reshapes a tensor
(`detach`, `transpose`, `resize_`, `promote_types`), run nothing on a device. What is a view is seen by the storage of
the result and not by a name, so that `reshape` and `contiguous` count where they copy. It counts as follows:

- Copies, conversions of dtype and fills (`clone`, `_to_copy`, `zeros`), and a value read by `item`: 1 each.
- An operator that PyTorch composes of others (`linear` in inference mode): its parts.
- `_foreach_*`: 1 where the tensors of its lists agree pairwise in shape, stride and dtype and all have one dtype and
  device, as the kernels over many tensors want them; else 1 a pair (1 a tensor, where there is one list).
- A fused optimiser (`_fused_adam_`): 1.
- A `torch.autograd.Function`: what its forward and backward dispatch.
- A custom operator (`torch.library`): what it dispatches inside, without allocations, at least 1; or, where `declare`
  says so, the kernels that it launches itself and no counter sees.

Elsewhere an allocation (`empty`) is an operator and counts, although a device starts nothing for it: batch norm
dispatches one. `Launches.allocations` says how many of the number these are.

A backward inside the block is counted: on the CPU autograd runs it in the calling thread, and autograd takes modes
along to the threads of other devices. Not seen are kernels that no operator of the dispatcher starts (C extensions by
pybind, Triton), nor that one operator may start several (the backward of a convolution, an LSTM on CUDA):
`device_launches` asks the profiler for these.
"""

from __future__ import annotations

import copy
import json
import operator
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['Launches', 'Step', 'count_step', 'declare', 'device_launches', 'extra']

OWN = ('aten', 'prim', 'prims')  # namespaces of PyTorch; operators of others are custom
READS = ('_local_scalar_dense', 'equal')  # give a number, but read a tensor for it
ALLOCATIONS = ('empty', 'empty_like', 'empty_strided', 'empty_permuted', 'new_empty', 'new_empty_strided')
DEVICE_CATEGORIES = ('kernel', 'gpu_memcpy', 'gpu_memset')  # of events in a trace of the profiler

Kernels = int | Callable[..., int]
DECLARED: dict[str, Kernels] = {}


class Launches(TorchDispatchMode):
    """Counts the launches of a block, see the text of this module.

        with Launches() as launches:
            model(x).sum().backward()
        launches.number, launches.of['mul']

    Attributes:
        of: name of an operator -> its launches. In-place operators have their own name (``'mul_'``), custom ones their
            namespace (``'library::name'``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self._within: str | None = None  # the custom operator whose operators are being dispatched

    @property
    def number(self) -> int:
        """All launches."""
        return self.of.total()

    @property
    def allocations(self) -> int:
        """How many of them allocate and compute nothing."""
        return sum(self.of[name] for name in ALLOCATIONS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        if func.namespace not in OWN:
            return self._custom(func, inputs, args, kwargs)
        if composed(func, backend_of(inputs)):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        number = groups(args, kwargs) if 'foreach' in name else 1
        out = func(*args, **kwargs)
        if self._within and name in ALLOCATIONS:  # what the custom operator does with it is its launch
            return out
        if number and runs(func, inputs, tensors(out)):
            self.of[self._within or name] += number
        return out

    def _custom(self, func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run a custom operator and count it by its declaration, or by what it dispatches."""
        name = func.name().partition('.')[0]
        if name in DECLARED:
            kernels = DECLARED[name]
            self.of[self._within or name] += kernels if isinstance(kernels, int) else kernels(*args, **kwargs)
            return func(*args, **kwargs)
        keys = torch._C.DispatchKeySet(backend_of(inputs))
        before, outer = self.number, self._within
        self._within = outer or name
        try:
            with self:
                out = func.redispatch(keys, *args, **kwargs)
        finally:
            self._within = outer
        if self.number == before:
            self.of[outer or name] += 1
        return out


def declare(name: str, kernels: Kernels) -> None:
    """State how many kernels a custom operator launches that starts them itself and dispatches no operators.

    Args:
        name: of the operator, such as ``'library::name'``.
        kernels: their number, or a function of the operator's arguments.
    """
    DECLARED[name] = kernels


def backend_of(inputs: list[Tensor]) -> Any:
    """Key of the dispatcher for the device of the inputs; numbers on the CPU may stand beside others."""
    kinds = [t.device.type for t in inputs] or [torch.get_default_device().type]
    kind = next((kind for kind in kinds if kind != 'cpu'), 'cpu')
    return getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(kind))


def composed(func: Any, backend: Any) -> bool:
    """Whether an operator is made of others; without autograd, as in inference mode, it arrives here whole.

    Some (`silu_backward`) are so in general and have a kernel of their own on this backend.
    """
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, func.name()
    return has_kernel(name, 'CompositeImplicitAutograd') and not has_kernel(name, backend)


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def runs(func: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """Whether an operator of PyTorch computes, copies or allocates; views do not."""
    if func._schema.is_mutable:
        return torch.Tag.inplace_view not in func.tags
    if func.overloadpacket.__name__ in READS:
        return True
    alias = torch._C._is_alias_of  # type: ignore[attr-defined]
    return any(not any(alias(out, given) for given in inputs) for out in outputs)


def groups(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Launches of an operator over lists of tensors: 1, or 1 a pair where one kernel cannot take them all."""
    every = (*args, *kwargs.values())
    lists = [a for a in every if isinstance(a, list | tuple) and a and all(isinstance(t, Tensor) for t in a)]
    if not lists:
        return 0
    first = lists[0][0]
    together = all(t.dtype == first.dtype and t.device == first.device for one in lists for t in one) and all(
        t.shape == pair[0].shape and t.stride() == pair[0].stride()
        for pair in zip(*lists, strict=False)
        for t in pair[1:]
    )
    return 1 if together else len(lists[0])


def extra(found: Launches, base: Launches) -> dict[str, int]:
    """What was launched beyond ``base``, by operator, the most first; less than 0 where it is launched less often."""
    more = {name: found.of[name] - base.of[name] for name in {**base.of, **found.of}}
    return dict(sorted(((name, n) for name, n in more.items() if n), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Step:
    """Launches of a model.

    Attributes:
        training: of a forward in training mode, the mean squares of its outputs as loss, and the backward. Without an
            optimiser, which updates many parameters in a launch.
        inference: of a forward in eval mode without gradients.
        device: of both, as the profiler saw them on a CUDA device; None without one.
    """

    training: Launches
    inference: Launches
    device: tuple[int, int] | None


def count_step(model: nn.Module, *inputs: Tensor) -> Step:
    """Count a training step and an inference on the CPU, and have the profiler count them on a CUDA device, if any.

    Works on copies: the model keeps its gradients, statistics and mode.
    """
    trained, still = on(model, 'cpu', training=True), on(model, 'cpu', training=False)
    given = [x.cpu() for x in inputs]
    with Launches() as training:
        backward(trained, given)
    with Launches() as inference:
        forward(still, given)
    if not torch.cuda.is_available():
        return Step(training, inference, None)
    trained, still = on(model, 'cuda', training=True), on(model, 'cuda', training=False)
    given = [x.cuda() for x in inputs]
    found = []
    for call in (partial(backward, trained, given), partial(forward, still, given)):
        call()  # libraries choose their algorithms
        trained.zero_grad(set_to_none=True)
        found.append(device_launches(call) or 0)
    return Step(training, inference, (found[0], found[1]))


def on(model: nn.Module, device: str, training: bool) -> nn.Module:
    """Copy a model to a device, without gradients."""
    model = copy.deepcopy(model).to(device)
    model.train(training)  # that of mmdet's ResNet returns None
    model.zero_grad(set_to_none=True)
    return model


def backward(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Forward, loss and backward."""
    reduce(operator.add, (out.square().mean() for out in tensors(model(*inputs)))).backward()


def forward(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Forward without gradients."""
    with torch.no_grad():
        model(*inputs)


def device_launches(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a CUDA device ran in ``call()``, as the profiler saw them; None without a device.

    Run ``call()`` once before, so that no library is still choosing its algorithms.
    """
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        return on_device(json.loads(path.read_text())['traceEvents'])


def on_device(events: Iterable[Mapping[str, Any]]) -> int:
    """Number of events of a profiler's trace that are work of a device."""
    return sum(event.get('ph') == 'X' and event.get('cat') in DEVICE_CATEGORIES for event in events)
