"""`restrict`: let only some parameters of a model learn, through all that trainers and models do to it.

Frameworks switch modes and set ``requires_grad`` again while they train: MMEngine's loop calls ``model.train()`` every
epoch, and mmdet's ``frozen_stages`` then freezes whole stages, with the gates in them. So a restricted model gets a
subclass of its class, of the same name, whose ``train()`` comes last. Batch norms whose affine does not learn stay in
eval mode there, since running statistics would change the frozen base without a gradient. Copies and pickles of the
model are restricted as well; `release` gives the class back, as folding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from asr_downstream.console.text import some
from asr_downstream.errors import warn
from asr_downstream.modules.slots import inside_gate
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.learning.choose import KEPT, Learning

__all__ = ['Restricted', 'keep_statistics', 'release', 'restrict', 'trained_beside_gates', 'warn_of_another_start']


class Restricted:
    """Mixin of a restricted model.

    Attributes:
        what_learns: the choice.
        unrestricted: the class that the model had and gets back.
    """

    what_learns: Learning
    unrestricted: ClassVar[type[nn.Module]]

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; what does not learn stays as it is."""
        result = super().train(mode)  # type: ignore[misc]
        hold(self, mode)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the class that the model had: the one it has cannot be imported."""
        found: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = found
        plain = tuple(self.unrestricted if argument is type(self) else argument for argument in arguments)
        return revive, (function, plain), *rest


def restrict(model: nn.Module, learning: Learning) -> None:
    """Let only the parameters that were chosen learn, in place; with ``'all'`` the model stays as it is.

    Before it is wrapped (DDP) and before the optimiser is built, which is given the parameters that require gradients.

    Args:
        model: that ``learning`` was chosen for; if it is restricted already, that is over.
        learning: of `asr_downstream.plugging.learning.choose.choose`.
    """
    release(model)
    if not learning.restricts:
        return
    names = set(learning.names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None
    model.__dict__[KEPT] = learning
    model.__class__ = restricted_class(type(model))
    hold(model, model.training)


def release(model: nn.Module) -> None:
    """Undo `restrict`, in place: class, ``requires_grad``, and the mode of the norms."""
    learning: Learning | None = model.__dict__.pop(KEPT, None)
    if learning is None:
        return
    kind: Any = type(model)
    if issubclass(kind, Restricted):
        model.__class__ = kind.unrestricted
    changes = {**dict.fromkeys(learning.frozen, True), **dict.fromkeys(learning.unfrozen, False)}
    for name, parameter in model.named_parameters():
        if name in changes:
            parameter.requires_grad_(changes[name])
    if model.training:
        model.train()


def hold(model: Any, mode: bool) -> None:
    """Let what learns learn, and the statistics of the rest stay, after a change of the mode."""
    names = set(model.what_learns.names)
    for name, parameter in model.named_parameters():
        if name in names and not parameter.requires_grad:
            parameter.requires_grad_(True)
    if mode and model.what_learns.statistics == 'frozen':
        keep_statistics(model)
    for gate in model.modules():  # those in stages that mmdet has set to eval mode
        if isinstance(gate, Gate | SharedUnit) and any(p.requires_grad for p in gate.parameters()):
            gate.train(mode)


def keep_statistics(model: nn.Module) -> None:
    """Set norms with statistics whose affine does not learn to eval mode, so that what is frozen stays as it is."""
    for norm in norms_with_statistics(model):
        if not any(parameter.requires_grad for parameter in norm.parameters(recurse=False)):
            norm.training = False


def trained_beside_gates(model: nn.Module) -> list[str]:
    """Names of what changes in the base of a restricted model: parameters that learn, statistics of their norms."""
    names = [name for name in vars(model)[KEPT].names if not inside_gate(model, name)]
    homes = {name.rpartition('.')[0] for name in names}
    kept = [name for name in model.state_dict() if name not in {*names}]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [*names, *(name for name in kept if name not in parameters and name.rpartition('.')[0] in homes)]


def warn_of_another_start(model: nn.Module) -> None:
    """Warn where gates that learn on a frozen base do not start at 1."""
    paths = [path for path, gate in model.named_modules() if isinstance(gate, Gate) and gate.reference is None]
    if paths:
        warn(
            f'the gates of {some(paths, 2)} do not start at 1, so a frozen base computes something else at first; give '
            f'the plug preserve=True to start from the base'
        )


def norms_with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Norms that have running statistics."""
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield module


CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def restricted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Restricted class of a class; its name is the same, since libraries write it into configs and files."""
    if base not in CLASSES:
        body = {
            'unrestricted': base,
            'stock_class': getattr(base, 'stock_class', base),
            **{key: getattr(base, key) for key in ('__module__', '__qualname__', '__doc__')},
        }
        CLASSES[base] = type(base.__name__, (Restricted, base), body)
    return CLASSES[base]


def revive(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Make an object as its class would be made again, of the restricted class."""
    model = function(*arguments)
    model.__class__ = restricted_class(type(model))
    return model
