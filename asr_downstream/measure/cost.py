"""What a model costs: multiply-adds, saved activations, the state of an optimiser."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Size = Sequence[int]  # shape of a tensor

__all__ = ['Saved', 'counting', 'gmacs', 'optimiser_bytes', 'parameters', 'saved_bytes']


def onednn_lstm(x: Size, *weights: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of one direction of one layer, from shapes ``(B, N, inputs)``, ``(4 width, inputs or width)``."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights[:2])


def cudnn_lstm(x: Size, weights: Sequence[Size], *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of all layers and directions; matrices and biases are in one list."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


def cpu_attention(q: Size, k: Size, v: Size, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of softmax attention, from shapes ``(B, heads, N, d)``."""
    return sdpa_flop_count(q, k, v)


# What torch.utils.flop_counter passes over: LSTMs, and the attention of the CPU; it knows those of GPUs.
OPERATORS = {
    torch.ops.aten.mkldnn_rnn_layer: onednn_lstm,
    torch.ops.aten._cudnn_rnn: cudnn_lstm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
}


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def gmacs(call: Callable[[], Any]) -> float:
    """Multiply-adds of convolutions, matrix products, attention and LSTMs in ``call()``, in units of 1e9.

    Half of the operations that torch.utils.flop_counter counts, and those that it passes over, see `OPERATORS`.
    """
    with torch.no_grad(), counting() as counter:
        call()
    return counter.get_total_flops() / 2e9


def counting() -> FlopCounterMode:
    """Return a counter of operations that knows LSTMs, and attention on the CPU."""
    return FlopCounter(display=False, custom_mapping=OPERATORS)


class FlopCounter(FlopCounterMode):
    """Counts ``torch.nn.MultiheadAttention`` by its parts: its fast path is one operator that no counter knows."""

    def __enter__(self) -> FlopCounter:
        self.fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self.fast)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters and buffers left out.

    Args:
        model: whose parameters and buffers do not count.
        forward: computes a scalar loss.
    """
    saved = Saved(model)
    with saved:
        loss = forward()  # keeps the graph alive until it is counted, so that no address is used twice
    del loss
    return saved.bytes


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts inside of its block what autograd keeps, see `saved_bytes`; what was computed has to stay alive in it.

    Attributes:
        bytes: so far.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: set[int] = set()
        self.bytes = 0

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own | kept:
                kept.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return t

        super().__init__(pack, lambda t: t)


def optimiser_bytes(parameters: Iterable[Tensor], make: Callable[[list[nn.Parameter]], Any]) -> int | None:
    """Bytes of the state that an optimiser has after a step, without the memory for it.

    It is asked for one parameter of each shape and type: a step without values takes a millisecond a parameter.

    Args:
        parameters: that it trains.
        make: builds the optimiser of a list of parameters; these have shapes and no values.

    Returns:
        The bytes; None: it cannot be said, as the optimiser looks at values.
    """
    count = Counter((tuple(parameter.shape), parameter.dtype) for parameter in parameters)
    empty = {nn.Parameter(torch.empty(shape, dtype=dtype, device='meta')): n for (shape, dtype), n in count.items()}
    if not empty:
        return 0
    for parameter in empty:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimiser = make([*empty])
        optimiser.step()
    except Exception:  # optimisers of others raise anything
        return None
    return sum(
        n * value.nbytes
        for parameter, n in empty.items()
        for value in optimiser.state.get(parameter, {}).values()
        if isinstance(value, Tensor)
    )
