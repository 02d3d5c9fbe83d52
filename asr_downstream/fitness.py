"""What a model has to be to be plugged or folded: bare, all here, with weights of its own that can be scaled."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError, FoldError, PlugError

__all__ = ['WRAPPERS', 'check_bare', 'check_module', 'check_own', 'check_weights', 'names_of']

FULL = 'load its full state dict into an unwrapped plugged model, and fold that'
# Package and class of what wraps or shards models -> how to come to the bare model, for fold. Where in the package the
# class lies changes with its version.
WRAPPERS: dict[str, str] = {
    'torch.DistributedDataParallel': 'fold(model.module)',
    'torch.DataParallel': 'fold(model.module)',
    'torch.FullyShardedDataParallel': FULL,
    'torch.FSDPModule': FULL,
    'torch.OptimizedModule': 'fold(model._orig_mod), before torch.compile',
    'torch.ScriptModule': 'fold the model before it becomes TorchScript',
    'deepspeed.DeepSpeedEngine': FULL,
}
SHARDED = 'torch.DTensor'
FLATTENED = '_fsdp_flattened'  # what FSDP1 sets on parameters that are views of its flat one


def names_of(cls: type) -> list[str]:
    """Package and name of a class and of its bases: ``'torch.Linear'``."""
    return [f'{base.__module__.partition(".")[0]}.{base.__name__}' for base in cls.__mro__]


def check_module(model: Any, function: str, error: type[AsrError] = AsrError) -> None:
    """Refuse what is no module.

    Raises:
        AsrError: of type ``error``.
    """
    if isinstance(model, nn.Module):
        return
    given = repr(model) if model is None or isinstance(model, str | int | float) else f'a {type(model).__name__}'
    if isinstance(model, type):
        given = f'the class {model.__name__}'
    hint = '; fold returns two things: folded, report = fold(model)' if isinstance(model, tuple) else ''
    raise error(f'{function}: expected a torch.nn.Module, got {given}{hint}')


def check_bare(model: nn.Module, error: type[AsrError]) -> None:
    """Refuse models that are wrapped, sharded or without values.

    Args:
        model: to plug or to fold.
        error: `PlugError` or `FoldError`, which also says what was to be done.

    Raises:
        AsrError: of type ``error``.
    """
    for path, module in model.named_modules():
        found = next((name for name in names_of(type(module)) if name in WRAPPERS), None)
        if found is not None:
            what = found.rpartition('.')[2]
            raise error(f'{named(path, model)}: is wrapped by {what}; {advice(error, what, WRAPPERS[found])}')
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if SHARDED in names_of(type(tensor)) or getattr(tensor, FLATTENED, False):
            raise error(f'{path}: is sharded over processes; {advice(error, "FSDP", FULL)}')
        if tensor.is_meta:
            raise error(f'{path}: is on the meta device, so it has no values; build the model, load its weights first')
    if error is PlugError and (wrapper := outer_wrapper(model)) is not None:
        what = type(wrapper).__name__
        raise error(f'{type(model).__name__}: is wrapped by {what}, which would not know of the gates; {FIRST}')


FIRST = 'plug first, then wrap'


def advice(error: type[AsrError], what: str, unwrapped: str) -> str:
    """What to do with a wrapped model."""
    if error is not FoldError:
        others = {'OptimizedModule': 'compile', 'ScriptModule': 'make TorchScript of it'}
        return f'plug first, then {others[what]}' if what in others else FIRST
    return unwrapped


def named(path: str, model: nn.Module) -> str:
    """Path of a module, or the class of the model itself."""
    return path or type(model).__name__


def outer_wrapper(model: nn.Module) -> Any:
    """Wrapper of DDP around ``model``, which does not hold it: parameters that come later are not averaged."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    own = {id(parameter) for parameter in model.parameters()}
    if find_wrapper(own) is None:
        return None
    gc.collect()  # one that was dropped wraps nothing
    return find_wrapper(own)


def find_wrapper(own: set[int]) -> Any:
    """Some wrapper of DDP that holds one of these parameters, by id."""
    for found in gc.get_objects():
        if issubclass(type(found), nn.parallel.DistributedDataParallel):
            module = found.__dict__.get('_modules', {}).get('module')
            if module is not None and any(id(parameter) in own for parameter in module.parameters()):
                return found
    return None


def check_weights(path: str, layer: nn.Module, error: type[AsrError]) -> None:
    """Refuse weights that are computed from others, quantised, or of a kind that gates cannot be multiplied into.

    Raises:
        AsrError: of type ``error``.
    """
    before = 'plug and fold first' if error is PlugError else 'fold first'
    for name in ('weight', 'bias'):
        value = getattr(layer, name, None)
        parameter = layer._parameters.get(name)
        if value is None:
            continue
        if parameter is None:
            raise error(
                f'{path}: its {name} is computed from other tensors (weight_norm, prune, a parametrization), so '
                f'nothing can be folded into it; remove that first, or leave the layer out of sites=[...]'
            )
        if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.dtype.itemsize == 1:
            raise error(f'{path}: its {name} is quantised ({parameter.dtype}); {before}, then quantise')
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise error(f'{path}: its {name} is a {kind}, no plain parameter; {before}, then quantise or shard it')
        if not parameter.numel():
            raise error(f'{path}: its {name} is empty; if it is sharded, {before}')


def check_own(model: nn.Module, layers: dict[str, nn.Module], error: type[AsrError]) -> None:
    """Refuse layers whose weights share memory with anything else in the model, which gates would scale as well.

    Seen are parameters, buffers, and tensors that modules hold in other ways, views of one storage too. Weights that
    lie side by side in one storage are apart.

    Raises:
        AsrError: of type ``error``.
    """
    by_storage: defaultdict[int, list[tuple[int, int, str, int, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, tensor in held(module):
            if (span := extent(tensor)) is not None:
                storage, start, end = span
                by_storage[storage].append((start, end, f'{path}.{name}' if path else name, id(module), name))
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters(recurse=False):
            span = extent(parameter)
            for start, end, other, owner, inside in by_storage[span[0]] if span else ():
                if (owner, inside) == (id(layer), name) or end <= span[1] or span[2] <= start:  # type: ignore[index]
                    continue
                what = 'another layer: ' if error is PlugError else ''
                raise error(
                    f'{path}: its {name} is shared with {what}{other}, which gates would scale as well; give that '
                    f'weights of its own (a clone), or leave the layer out of sites=[...]'
                )


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a module itself holds: parameters, buffers, attributes, also in lists and dicts."""
    for own in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in own.items() if tensor is not None)
    hidden = ('_parameters', '_buffers', '_modules')
    for name, value in vars(module).items():
        if name not in hidden:
            yield from tensors_in(value, name)


def tensors_in(value: Any, name: str, opened: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested lists and dicts; objects in them are not opened."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple | dict) and id(value) not in opened:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(item, f'{name}[{key!r}]', opened | {id(value)})


def extent(tensor: Tensor) -> tuple[int, int, int] | None:
    """Storage of a tensor and the bytes that it spans there; None: it has none that could be shared."""
    if tensor.is_meta or not tensor.numel() or tensor.layout is not torch.strided:
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), start, start + (last + 1) * tensor.element_size()
