"""MMDetection models that take ``plug`` or ``replace``: backbones, necks, detectors, as ``type='asr_downstream.NAME'``.

A plugged model is its stock class with gates: same arguments, same keys, same initial stock weights for one seed.
`asr_downstream.fold` gives back the stock class. A backbone's plug sees the backbone; a detector's plug sees all of it,
so that necks and heads can be named: ``sites=['neck.fpn_convs.*.conv', 'bbox_head.retina_cls']``. Frozen stages are
left out, unless ``plug_frozen=True``, which a config with ``learns`` sets.

``replace=dict(type='FAR', layers='all')`` puts LSTMs in the places of self-attentions (`asr_downstream.far.replace`);
stock checkpoints load, and what they lack is said. Detectors also take ``distil=dict(...)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from mmdet.models import backbones, detectors, necks
from mmdet.models.detectors.base import BaseDetector
from torch import nn

from asr_downstream.detection.models.activation_checkpointing import use_non_reentrant
from asr_downstream.detection.models.distil import DistilledDetector
from asr_downstream.detection.models.far import keep_fresh, put_lstms, refuse_both, report_load
from asr_downstream.detection.types import PRETRAINED, kind_of
from asr_downstream.far.model.mixer import Mixer
from asr_downstream.modules.slots import SHARED, SLOTS, SharedAttentions
from asr_downstream.plugging.attach import rebind
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.plug import Spec
from asr_downstream.plugging.plug import plug as attach_plug
from asr_downstream.plugging.plugs.start import scaled_again, warn_of_pretrained
from asr_downstream.plugging.save import starts
from asr_downstream.registry import MODELS

__all__ = ['PluggedModel', 'plugged_class']


class PluggedModel:
    """Mixin: changes the model once it is built, and keeps mmdet's mode switches and initialisation as they are."""

    stock_class: ClassVar[type[nn.Module]]

    def __init__(
        self, *args: Any, plug: Spec | None = None, plug_frozen: bool = False, replace: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if replace is not None:
            put_lstms(self, replace)  # type: ignore[arg-type]
        if plug is not None:
            to_dict = getattr(plug, 'to_dict', None)  # a config holds the spec as mmengine's own dicts
            attach_plug(self, to_dict() if to_dict else plug, frozen=plug_frozen)  # type: ignore[arg-type]
            refuse_both(self)  # type: ignore[arg-type]
            use_non_reentrant(self)  # type: ignore[arg-type]
            for module in self.modules():  # type: ignore[attr-defined]
                if hasattr(module, '_freeze_stages'):  # sites that were named in frozen stages
                    module._freeze_stages()

    def train(self, mode: bool = True) -> Any:
        """Switch the mode.

        Gates of layers that a SyncBN conversion has rebuilt are attached again. ``norm_eval=True`` is about pretrained
        statistics: batch norms inside an attention have none, and train.
        """
        rebind(self)  # type: ignore[arg-type]
        result = super().train(mode)  # type: ignore[misc]
        for gate in [m for m in self.modules() if isinstance(m, Gate | SharedUnit)]:  # type: ignore[attr-defined]
            if any(p.requires_grad for p in gate.parameters()):
                gate.train(mode)
        return result

    def init_weights(self) -> None:
        """Initialise as the stock class does; gates and replacements keep the start that they have chosen.

        What a `Start` has scaled is scaled again where it was set anew, also from pretrained weights of ``init_cfg``.
        """
        with additions_aside(self), scaled_again(self):  # type: ignore[arg-type]
            super().init_weights()  # type: ignore[misc]
        if values := starts(self, inside=False):  # type: ignore[arg-type]
            modules = self.named_modules()  # type: ignore[attr-defined]
            loaded = [path for path, module in modules if is_pretrained(getattr(module, 'init_cfg', None))]
            warn_of_pretrained({site: values[site] for site in values if any(inside(site, path) for path in loaded)})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load as before; a model with replacements says what a stock checkpoint lacks (MMEngine calls this too)."""
        if self.__dict__.get('replace_spec') is not None:
            keep_fresh(self, state_dict, prefix)  # type: ignore[arg-type]
            report_load(self, state_dict, prefix)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


@contextmanager
def additions_aside(model: nn.Module) -> Iterator[None]:
    """Hide what was put in from initialisations, some of which go through all linear layers; not from checkpoints."""
    loading = [m for m in model.modules() if is_pretrained(getattr(m, 'init_cfg', None))]
    filled = {id(inner) for m in loading for inner in m.modules()}
    hidden: list[tuple[Any, str, nn.Module]] = []
    for module in model.modules():
        for slot in SLOTS if isinstance(module, Plugged) else (SHARED, 'mixer'):
            child = module._modules.get(slot)
            if isinstance(child, nn.ModuleList | SharedAttentions | Mixer) and id(module) not in filled:
                hidden.append((module, slot, child))
    for module, slot, _ in hidden:
        module._modules[slot] = None
    try:
        yield
    finally:
        for module, slot, child in hidden:
            module._modules[slot] = child


def inside(path: str, parent: str) -> bool:
    """Whether a module lies in another one, '' being the whole model."""
    return not parent or path == parent or path.startswith(f'{parent}.')


def is_pretrained(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` (a dict or a list of them) loads a checkpoint."""
    entries = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or ())
    return any(kind_of(entry.get('type')) in PRETRAINED for entry in entries)


def plugged_class(stock: type[nn.Module]) -> type[Any]:
    """Make and register the plugged class of a stock class of MMDetection."""
    doc = f'`{stock.__name__}` of MMDetection with ``plug`` and ``replace``.'
    bases = (DistilledDetector, PluggedModel, stock) if issubclass(stock, BaseDetector) else (PluggedModel, stock)
    made = type(stock.__name__, bases, {'stock_class': stock, '__doc__': doc, '__module__': __name__})
    MODELS.register_module(name=stock.__name__, module=made)
    return made


# As attributes of this module, so that they pickle like any class.
for _package in (backbones, necks, detectors):
    for _name in _package.__all__:
        if issubclass(getattr(_package, _name), nn.Module) and _name not in globals():
            globals()[_name] = plugged_class(getattr(_package, _name))
