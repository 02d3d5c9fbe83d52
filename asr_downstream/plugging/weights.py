"""Weights of a model that may be plugged: whether they are finite, and whether they fit it.

Reading files is the matter of `asr_downstream.files.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.weights import is_finite
from asr_downstream.modules.slots import GATES, inside_gate

__all__ = ['check_weights_finite', 'load_state', 'new_weights', 'not_finite']

STATISTICS = ('running_mean', 'running_var')  # buffers of norms


def check_weights_finite(state: Mapping[str, Tensor], path: Path, model: nn.Module | None = None) -> None:
    """Refuse weights with NaN or infinity, which compute without an error and mean nothing.

    Args:
        state: names and tensors, of any type.
        path: file they were read from, for the message.
        model: whose weights they are, to tell masks from weights; see `not_finite`.

    Raises:
        CheckpointError: some are not finite; with their names.
    """
    if broken := not_finite(state, model):
        raise CheckpointError(
            f'{path}: {some(broken)} {"is" if len(broken) == 1 else "are"} not finite: the training that wrote it had '
            f'diverged; take another checkpoint, from before'
        )


def not_finite(state: Mapping[str, Tensor], model: nn.Module | None = None) -> list[str]:
    """Names of the tensors that have NaN or infinity.

    Args:
        state: names and tensors.
        model: whose weights they are: infinities in its buffers, such as causal masks, are allowed. NaN is not, nor
            infinities in the statistics of norms and in gates.
    """
    broken = [name for name, value in state.items() if not is_finite(value)]
    if not broken or model is None:
        return broken
    masks = {
        name
        for name, _ in model.named_buffers()
        if name.rpartition('.')[2] not in STATISTICS and not inside_gate(model, name)
    }
    return [name for name in broken if name not in masks or bool(state[name].isnan().any())]


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights strictly; the model is not touched unless everything fits.

    Raises:
        CheckpointError: names or shapes do not fit; the message tells folded, plugged and foreign checkpoints apart.
    """
    own = model.state_dict()
    gates = gate_keys(model)
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    name = type(model).__name__
    if gates and not reshaped and not unexpected and missing and set(missing) <= gates:
        raise CheckpointError(
            f'{path}: has no gates, but the config plugs {name}: it is a stock checkpoint, or was folded already; '
            f'use it with the stock config, or give the checkpoint that training wrote'
        )
    if unexpected and not reshaped and not missing and all(GATES.search(k) for k in unexpected):
        raise CheckpointError(
            f'{path}: has gates, but the config builds a stock {name}; use the config it was trained with, '
            f'or fold it first with tools/fold.py'
        )
    if missing or unexpected or reshaped:
        parts = [
            f'{len(missing)} missing ({some(missing, 2)})' if missing else '',
            f'{len(unexpected)} unknown ({some(unexpected, 2)})' if unexpected else '',
            (
                f'{len(reshaped)} of another shape ({reshaped[0]}: {tuple(state[reshaped[0]].shape)}, '
                f'expected {tuple(own[reshaped[0]].shape)})'
            )
            if reshaped
            else '',
        ]
        raise CheckpointError(
            f'{path}: was made for another model than the config builds ({name}): '
            f'{"; ".join(filter(None, parts))}; use the config it was trained with'
        )
    model.load_state_dict(state, strict=True)


def gate_keys(model: nn.Module) -> set[str]:
    """Names of the weights that plugging has added."""
    return {key for key in model.state_dict() if inside_gate(model, key)}


def new_weights(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, named: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Names of the weights that a checkpoint of the base does not have, or in another shape, such as those of a head.

    Args:
        model: plugged or stock; gates may be missing, all of them or none.
        state: of the checkpoint.
        path: of it, for messages.
        named: whether a weight of another head may be left out of the checkpoint.

    Raises:
        CheckpointError: it is of another model: it has weights that the model has no place for.
    """
    own, gates, name = model.state_dict(), gate_keys(model), type(model).__name__
    missing = [k for k in own if k not in state and k.rpartition('.')[2] != 'num_batches_tracked']
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    lost = [k for k in missing if k in gates]
    if (lost and len(lost) < len(gates)) or any(k in gates for k in reshaped):
        wrong = [*lost, *(k for k in reshaped if k in gates)]
        raise CheckpointError(
            f'{path}: its gates are others than those that the config plugs ({some(wrong, 2)}); give the config that '
            f'it was trained with, or a stock checkpoint'
        )
    unknown = [k for k in state if k not in own and not named(k)]
    if any(GATES.search(k) for k in unknown):
        raise CheckpointError(f'{path}: has gates that {name} has not ({some(unknown, 2)}); fold it first')
    if unknown or len(missing) == len(own):
        raise CheckpointError(
            f'{path}: was made for another model than the config builds ({name}): it has {some(unknown, 2)}, and '
            f'lacks {some(missing, 2)}; what is frozen has to be in it. Weights of a head that was replaced are left '
            f"out where learns names it, learns=['gates', 'bbox_head.*']"
        )
    return [k for k in own if (k in missing and k not in gates) or k in reshaped]
