"""Checks of a model before it is plugged or folded: not wrapped or sharded, with weights that can be scaled."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError, FoldError, PlugError
from asr_downstream.modules.slots import SLOTS

__all__ = ['WRAPPERS', 'check_bare', 'check_module', 'check_own', 'check_sites_bare', 'check_weights', 'names_of']

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
# As parts of a model they stay, unless there are sites in them.
PARTS = ('torch.OptimizedModule', 'torch.ScriptModule')
SHARDED = 'torch.DTensor'
FLATTENED = '_fsdp_flattened'  # what FSDP1 sets on parameters that are views of its flat one


def names_of(cls: type) -> list[str]:
    """Package and name of a class and of its bases: ``'torch.Linear'``."""
    return [f'{base.__module__.partition(".")[0]}.{base.__name__}' for base in cls.__mro__]


def check_module(model: Any, function: str, error: type[AsrError] = AsrError) -> None:
    """Refuse a value that is no module.

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
        found = wrapper_of(module)
        if found is not None and not (path and found in PARTS):
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


def wrapper_of(module: nn.Module) -> str | None:
    """Which of `WRAPPERS` a module is."""
    return next((name for name in names_of(type(module)) if name in WRAPPERS), None)


def check_sites_bare(model: nn.Module, paths: Iterable[str], error: type[AsrError]) -> None:
    """Refuse sites in compiled or scripted parts of a model, and gates that were scripted with a part.

    Raises:
        AsrError: of type ``error``.
    """
    for part, module in model.named_modules():
        if (found := wrapper_of(module)) not in PARTS or not part:
            continue
        site = next((path for path in paths if path == part or path.startswith(f'{part}.')), None)
        scripted = (name for name, _ in module.named_modules() if name.rpartition('.')[2] in SLOTS)
        inside = f'{part}.{next(scripted, "")}' if found == 'torch.ScriptModule' else None
        if site is None and (inside is None or inside.endswith('.')):
            continue
        what = found.rpartition('.')[2]
        whole = WRAPPERS[found] if found == 'torch.ScriptModule' else 'fold the model before a part is compiled'
        raise error(f'{site or inside}: lies in {part}, which is wrapped by {what}; {advice(error, what, whole)}')


FIRST = 'plug first, then wrap'


def advice(error: type[AsrError], what: str, unwrapped: str) -> str:
    """Text that says how to plug or fold a wrapped model."""
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
        if torch.nn.parameter.is_lazy(parameter):
            raise error(
                f'{path}: its {name} has no shape yet; run the model once, then {before.removesuffix(" first")}'
            )
        if not is_plain(parameter):
            kind = type(parameter).__name__
            raise error(f'{path}: its {name} is a {kind}, no plain parameter; {before}, then quantise or shard it')
        if not parameter.numel():
            raise error(f'{path}: its {name} is empty; if it is sharded, {before}')


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is plain, or of a subclass that does not change how torch computes with it."""
    classes = type(parameter).__mro__
    own = [cls for cls in classes if cls not in nn.Parameter.__mro__]
    return nn.Parameter in classes and not any(
        name in vars(cls) for cls in own for name in ('__torch_function__', '__torch_dispatch__')
    )


def check_own(model: nn.Module, layers: dict[str, nn.Module], error: type[AsrError]) -> None:
    """Refuse layers whose weights share memory with another tensor of the model, which gates would scale as well.

    Compared are parameters, buffers, and tensors in other attributes, views of one storage too, unless they have no
    element in common. A module may keep a list of its own parameters, such as those without weight decay.

    Raises:
        AsrError: of type ``error``.
    """
    by_storage: defaultdict[int, list[tuple[Tensor, str, str]]] = defaultdict(list)
    own: dict[int, str] = {}  # the first path of each
    for path, module in model.named_modules():
        own[id(module)] = path
        for name, tensor in held(module):
            if (span := extent(tensor)) is not None:
                by_storage[span[0]].append((tensor, path, name))
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters(recurse=False):
            span = extent(parameter)
            for tensor, owner, inside in by_storage[span[0]] if span else ():
                listed = '[' in inside and tensor is parameter and f'{path}.'.startswith(f'{owner}.' if owner else '')
                if (owner, inside) == (own[id(layer)], name) or listed or not overlap(tensor, parameter):
                    continue
                other = f'{owner}.{inside}' if owner else inside
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
    opened: dict[int, Any] = {}
    for name, value in vars(module).items():
        if name not in hidden:
            yield from tensors_in(value, name, opened)


def tensors_in(value: Any, name: str, opened: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested lists and dicts, each of which is opened once; objects in them are not opened."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple | dict) and id(value) not in opened:
        opened[id(value)] = value
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(item, f'{name}[{key!r}]', opened)


def extent(tensor: Tensor) -> tuple[int, int, int] | None:
    """Storage of a tensor and the bytes that it spans there; None: it has none that could be shared."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), start, start + (last + 1) * tensor.element_size()


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common; columns of one matrix have none."""
    first, second = extent(one), extent(other)
    if first is None or second is None or first[2] <= second[1] or second[2] <= first[1]:
        return False
    size, begin = one.element_size(), min(first[1], second[1])
    dense = one.is_contiguous() and other.is_contiguous()
    if dense or other.element_size() != size or (first[1] - second[1]) % size:
        return True
    taken = torch.zeros((max(first[2], second[2]) - begin) // size, dtype=torch.bool)
    taken[offsets(one) + (first[1] - begin) // size] = True
    return bool(taken[offsets(other) + (second[1] - begin) // size].any())


def offsets(tensor: Tensor) -> Tensor:
    """Where the elements of a tensor lie, counted from its first one."""
    found = torch.zeros((), dtype=torch.long)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + torch.arange(size) * stride
    return found.flatten()
