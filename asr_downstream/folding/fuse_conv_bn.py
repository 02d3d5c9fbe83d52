"""Convolution and batch norm as one convolution, for inference: an optional step after `asr_downstream.fold`.

Which norm follows which convolution is observed in a forward, not guessed from the order of registration (mmcv's
`fuse_conv_bn` guesses, and can be wrong without a word); the result is compared with the model before it is returned.
What comes back is no stock model any more: its norms are gone. It is for deployment, not for a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from asr_downstream.console.text import some
from asr_downstream.errors import FoldError
from asr_downstream.folding.verify import beyond_rounding, check_inputs, outputs_of, run, verify
from asr_downstream.modules.check import check_module
from asr_downstream.modules.copies import copy_of
from asr_downstream.plugging.followed import followers
from asr_downstream.plugging.layers import Plugged

__all__ = ['fuse_conv_bn']

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fuse_conv_bn(model: nn.Module, inputs: Any) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Fuse every batch norm with the convolution before it, in a copy.

    Args:
        model: in eval mode, without plugs; it is not changed. Its outputs should be continuous in the weights: of a
            detector the feature maps, not the boxes.
        inputs: an example for the model, as `asr_downstream.verify` takes it.

    Returns:
        The copy, and the paths of the convolutions and norms that were fused.

    Raises:
        FoldError: training mode, plugs, nothing to fuse, or the fused model computes something else.
    """
    check_module(model, 'fuse_conv_bn', FoldError)
    check_inputs(inputs, 'fuse_conv_bn')
    plugged = [path for path, m in model.named_modules() if isinstance(m, Plugged)]
    if plugged:
        raise FoldError(f'{some(plugged, 2)}: is plugged; fold the model first, then fuse')
    if any(m.training for m in model.modules() if isinstance(m, _BatchNorm)):
        raise FoldError('a batch norm is in training mode: call model.eval() first (fusing is for inference)')
    fused = copy_of(model, FoldError)
    pairs = observe(fused, inputs)
    if not pairs:
        raise FoldError(f'{type(model).__name__}: no batch norm follows a convolution')
    for conv_path, norm_path in pairs:
        conv: Any = fused.get_submodule(conv_path)
        norm: Any = fused.get_submodule(norm_path)
        dtype = conv.weight.dtype
        w, b, mean, var, gamma, beta = (
            None if t is None else t.double()
            for t in (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        weight, bias = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)  # type: ignore[arg-type]
        conv.weight, conv.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        parent, _, name = norm_path.rpartition('.')
        then = [step for step in (getattr(norm, child, None) for child in followers(type(norm))) if step is not None]
        setattr(fused.get_submodule(parent), name, nn.Sequential(*then) if then else nn.Identity())
    found = verify(fused, model, inputs)
    if (worst := beyond_rounding(found, model)) is not None:
        raise FoldError(
            f'the fused model computes something else (relative difference {worst.relative:.1e}): a convolution has '
            f'another reader than its norm, or the outputs are not continuous in the weights'
        )
    return fused, pairs


def observe(model: nn.Module, inputs: Any) -> list[tuple[str, str]]:
    """Run once; return the pairs of a convolution and the norm that read its output, in all calls of both."""
    # id of a convolution's output -> its path and version, which changes where something works in place; the tensors
    # are kept, so that ids stay theirs.
    made: dict[int, tuple[str, int]] = {}
    kept: list[Any] = []
    met: Counter[tuple[str, str]] = Counter()
    calls: Counter[str] = Counter()
    handles = []

    def after_conv(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept.append(output)
            made[id(output)] = path, output._version
            calls[path] += 1

        return hook

    def before_norm(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            calls[path] += 1
            conv, version = made.get(id(args[0]), ('', -1))
            if version == args[0]._version:
                met[conv, path] += 1

        return hook

    for path, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            handles.append(module.register_forward_hook(after_conv(path)))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm(path)))
    try:
        outputs_of(model, inputs[0] if isinstance(inputs, list) else inputs, run)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair, count in met.items() if calls[pair[0]] == calls[pair[1]] == count]
