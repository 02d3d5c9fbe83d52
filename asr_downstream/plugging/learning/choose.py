"""`choose`: which parameters of a model learn. Nothing is changed.

    choose(model, 'gates')                          the gates, and the attentions that sites share
    choose(model, 'gates+norms')                    and the affines of all norms
    choose(model, ['gates', 'bbox_head.retina_*'])  and weights by their names, as fnmatch patterns

`asr_downstream.plugging.learning.restrict.restrict` makes it so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from asr_downstream.attention.base import is_norm
from asr_downstream.console.text import Printed, some
from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.files.atomic import size
from asr_downstream.measure.cost import optimiser_bytes
from asr_downstream.modules.check import check_module
from asr_downstream.modules.slots import inside_gate

__all__ = ['ALL', 'KEPT', 'STATISTICS', 'Learning', 'choose', 'named_by', 'words_of']

ALL = 'all'
STATISTICS = ('frozen', 'running')
KEPT = 'what_learns'  # attribute of a restricted model: its `Learning`
# Names of classes that normalise and derive from none of torch's: RMSNorm, LayerNorm2d, T5LayerNorm.
NORM = re.compile(r'Norm(\d[dD])?$')


@dataclass(frozen=True, repr=False)
class Learning(Printed):
    """What learns in a model. Prints as a line.

    Attributes:
        learns: the words and patterns that chose it.
        names: of the parameters that learn, in the order of the model.
        new: those of them that are no part of the base, as a checkpoint did not have them.
        numbers: how many numbers learn.
        total: how many numbers the model has.
        gradients: bytes of their gradients.
        gradients_saved: bytes of gradients that are not needed, compared with ``'all'``.
        state: bytes of the state of the optimiser; None: not known.
        state_saved: bytes of it that are not needed, compared with ``'all'``.
        statistics: of norms whose affine does not learn: ``'frozen'`` or ``'running'``.
        frozen: names of the parameters that would learn with ``'all'`` and do not.
        unfrozen: names of those that the model itself has frozen and that learn.
    """

    learns: tuple[str, ...]
    names: tuple[str, ...]
    new: tuple[str, ...]
    numbers: int
    total: int
    gradients: int
    gradients_saved: int
    state: int | None = None
    state_saved: int | None = None
    statistics: str = 'frozen'
    frozen: tuple[str, ...] = ()
    unfrozen: tuple[str, ...] = ()

    @property
    def restricts(self) -> bool:
        """Whether something else learns than in the model by itself."""
        return self.learns != (ALL,)

    def measured(self, model: nn.Module, make: Callable[[list[nn.Parameter]], Any]) -> Learning:
        """Return it with the bytes of the optimiser's state.

        Args:
            model: that it was chosen for.
            make: parameters -> optimiser; it is tried on tensors without values.
        """
        params = dict(model.named_parameters())
        by_itself = {*self.frozen, *self.names} - {*self.unfrozen}
        state = optimiser_bytes([params[name] for name in self.names], make)
        before = state
        if by_itself != {*self.names}:
            before = optimiser_bytes([p for name, p in params.items() if name in by_itself], make)
        if before is None or state is None:
            return self
        return replace(self, state=state, state_saved=before - state)

    def parts(self) -> list[Any]:
        share = f'{self.numbers:,} of {self.total:,} numbers ({self.numbers / max(1, self.total):.2%})'
        text = f'learns {", ".join(self.learns)}: {len(self.names)} weights, {share}'
        if self.new:
            text += f'; new, and so among them: {some(list(self.new))}'
        if self.restricts:
            text += f'; saves {size(self.gradients_saved)} of gradients'
            if self.state_saved is not None:
                text += f' and {size(self.state_saved)} of the state of the optimiser'
            text += f'; statistics of norms that do not learn are {self.statistics}'
        return [text]


def choose(
    model: nn.Module, learns: str | Sequence[str] = ALL, new: Collection[str] = (), statistics: str = 'frozen'
) -> Learning:
    """Choose the parameters that learn.

    What the model has frozen by itself, as mmdet's ``frozen_stages`` does, stays frozen unless it is a gate, or a
    pattern names it.

    Args:
        model: plugged or stock; restricted ones as if they were not.
        learns: ``'all'``; ``'gates'`` (and the attentions that sites share); ``'norms'``, the affines of all norms;
            ``'bias'``, the biases of the base; several with ``+``; patterns of names of parameters; or a list of these.
        new: names of weights that learn in any case, as they are no part of the base.
        statistics: what norms whose affine does not learn do with their statistics in training: ``'frozen'`` or
            ``'running'``.

    Raises:
        PlugError: something in ``learns`` is not known or matches nothing.
    """
    check_module(model, 'choose', PlugError)
    if statistics not in STATISTICS:
        raise PlugError(f'statistics={statistics!r} is not known; {did_you_mean(str(statistics), STATISTICS)}')
    words = words_of(learns)
    params = dict(model.named_parameters(remove_duplicate=False))
    held: Learning | None = vars(model).get(KEPT)
    free = {name for name, p in params.items() if p.requires_grad}
    if held is not None:
        free = (free | set(held.frozen)) - set(held.unfrozen)
    chosen = {id(params[name]) for name in new if name in params}
    for word in words:
        chosen |= {id(params[name]) for name in matches(model, word, params, free)}
    return learning_of(model, words, chosen, free, tuple(n for n in new if n in params), statistics)


def learning_of(
    model: nn.Module, words: tuple[str, ...], chosen: set[int], free: set[str], new: tuple[str, ...], statistics: str
) -> Learning:
    """Count what was chosen; ``chosen`` are ids of parameters, ``free`` names of those that learn by themselves."""
    params = dict(model.named_parameters())
    names = tuple(name for name, p in params.items() if id(p) in chosen)
    frozen = tuple(name for name in params if name in free and name not in set(names))
    gradients = sum(params[name].nbytes for name in names)
    before = sum(p.nbytes for name, p in params.items() if name in free)
    return Learning(
        learns=words,
        names=names,
        new=new,
        numbers=sum(params[name].numel() for name in names),
        total=sum(p.numel() for p in params.values()),
        gradients=gradients,
        gradients_saved=before - gradients,
        statistics=statistics,
        frozen=frozen,
        unfrozen=tuple(name for name in names if name not in free),
    )


def words_of(learns: Any) -> tuple[str, ...]:
    """Words and patterns of ``learns``: ``'gates+norms'`` -> ``('gates', 'norms')``; with ``'all'`` it is all.

    Raises:
        PlugError: it is neither a text nor a list of texts, or empty.
    """
    given = [learns] if isinstance(learns, str) else learns
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str) and one for one in given):
        raise PlugError(
            f"learns={learns!r} should be 'all', {', '.join(map(repr, GROUPS))}, a pattern of names such as "
            f"'bbox_head.*', or a list of these"
        )
    words = tuple(dict.fromkeys(word for one in given for word in one.split('+')))
    return (ALL,) if ALL in words else words


def named_by(words: Iterable[str], name: str) -> bool:
    """Whether one of the patterns of ``learns`` matches a name."""
    return any(fnmatchcase(name, word) for word in words if word not in GROUPS)


def matches(model: nn.Module, word: str, params: dict[str, nn.Parameter], free: set[str]) -> list[str]:
    """Names of the parameters that a word or a pattern means.

    Raises:
        PlugError: there are none.
    """
    if word == ALL:
        return sorted(free)
    if word not in GROUPS:
        if found := [name for name in params if fnmatchcase(name, word)]:
            return found
        raise PlugError(f'learns: {word!r} matches no weight of {type(model).__name__}; {nearest(word, list(params))}')
    found = [name for name in params if GROUPS[word](model, name)]
    if not found:
        raise PlugError(f'learns={word!r}: {type(model).__name__} {WITHOUT[word]}')
    if word != 'gates' and not (found := [name for name in found if name in free]):
        raise PlugError(
            f'learns={word!r}: the model itself has frozen all of them (mmdet: frozen_stages, requires_grad=False of '
            f'norms); name those that should learn by a pattern, such as backbone.*.bn*.weight'
        )
    return found


def nearest(word: str, names: list[str]) -> str:
    """Say which names are like a pattern that matches none, for an error."""
    if below := [name for name in names if name.startswith(f'{word.rstrip(".")}.')]:
        return f'below it are {some(below, 2)}: {word.rstrip(".") + ".*"!r}'
    if close := difflib.get_close_matches(word, GROUPS, n=1, cutoff=0.6):
        return f'did you mean {close[0]!r}?'
    close = difflib.get_close_matches(word, names, n=3, cutoff=0)
    return f'the nearest are {", ".join(close)}'


def is_affine(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight or bias of a norm of the base."""
    path, _, own = name.rpartition('.')
    module = model.get_submodule(path)
    normalises = is_norm(module) or NORM.search(type(module).__name__) is not None
    value: Tensor = getattr(module, own)
    return normalises and (is_norm(module) or value.ndim <= 1) and not inside_gate(model, name)


def is_bias(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a bias of the base: of a layer, or of a norm."""
    return name.rpartition('.')[2].endswith('bias') and not inside_gate(model, name)


# Word of ``learns`` -> whether a parameter of a model, by its name, belongs to it; and what to say where none does.
GROUPS: dict[str, Callable[[nn.Module, str], bool]] = {'gates': inside_gate, 'norms': is_affine, 'bias': is_bias}
WITHOUT = {
    'gates': (
        "has no gates, it is a stock model; name an attention, plug=dict(type='ASR', attention=dict(type='SE')), or "
        "train its norms, learns='norms'"
    ),
    'norms': "has no norms with weights; name what learns by a pattern, such as 'head.*'",
    'bias': "has no biases; name what learns by a pattern, such as 'head.*'",
}
