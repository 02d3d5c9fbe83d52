"""`fold_exactly`: put constant gates into the weights of their layers; what comes back is the stock model.

The arithmetic is that of `asr_downstream.modules.affine`, evaluated once in float64 and cast back once. All new weights
are computed and checked before the first one is stored, and they are stored in a copy, so a failure changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, FoldError, warn
from asr_downstream.folding.passes import Step
from asr_downstream.folding.report import FoldedSite, FoldReport
from asr_downstream.folding.verify import Verification, beyond_rounding, check_inputs, compare, run
from asr_downstream.modules.affine import Constants, scaled
from asr_downstream.modules.check import check_bare, check_module, check_own, check_sites_bare, check_weights
from asr_downstream.modules.copies import copy_of
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.bank.hooks import uninstall
from asr_downstream.plugging.describe import attention_name, check_connected
from asr_downstream.plugging.gating.gates import Gate, saturation, side_of
from asr_downstream.plugging.gating.shared_unit import unregister
from asr_downstream.plugging.gating.sides import INPUT, OUTPUT
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.learning.restrict import release
from asr_downstream.plugging.save import forget, keep_dynamic, starts

__all__ = [
    'Comparison',
    'check_dynamic',
    'check_mode',
    'comparison',
    'constants_of',
    'fold_exactly',
    'fold_gates',
    'make_stock_',
]


@dataclass(frozen=True)
class ScaledParameters:
    weight: Tensor
    bias: Tensor | None
    site: FoldedSite


Comparison: TypeAlias = Callable[[nn.Module, nn.Module], Verification]


def fold_exactly(
    model: nn.Module, dynamic: str = 'error', *, step: Step | None = None, check: Any = None
) -> tuple[nn.Module, FoldReport]:
    """Fold the constant gates of ``model``; see `asr_downstream.fold`, which is this without ``calibrate``."""
    check_module(model, 'fold', FoldError)
    check_dynamic(dynamic)
    if step is not None and check is None:
        raise FoldError('fold: step says how to run the inputs of check=..., and there are none')
    return fold_gates(model, dynamic, comparison(check, step))


def check_dynamic(dynamic: Any) -> None:
    """Refuse a ``dynamic`` other than ``'error'`` and ``'keep'``.

    Raises:
        FoldError: it is another.
    """
    if dynamic not in ('error', 'keep'):
        raise FoldError(f"fold: dynamic={dynamic!r} is not known, use 'error' or 'keep'")


def comparison(check: Any, step: Step | None) -> Comparison | None:
    """Return a function that compares the plugged and the folded model on the inputs of the user; None without any."""
    if check is None:
        return None
    try:
        check_inputs(check, 'fold: check')
    except AsrError as error:
        raise FoldError(str(error)) from None

    def compare_both(plugged: nn.Module, folded: nn.Module) -> Verification:
        calls = check if isinstance(check, list) else [check]
        try:
            found = compare(folded, plugged, calls, step or run)
        except AsrError as error:
            raise FoldError(f'check: {error}') from error
        worst = beyond_rounding(found, plugged)
        if worst is not None and beyond_rounding(compare(plugged, plugged, calls, step or run), plugged) is not None:
            raise FoldError(
                f'check: {type(plugged).__name__} itself computes something else each time, so nothing can be compared '
                f'with it; seed what it draws, in step=...'
            )
        if worst is not None:
            raise FoldError(
                f'the folded model computes something else ({worst.output}: relative difference {worst.relative:.1e}): '
                f'a weight is read elsewhere than by its layer, which gates do not reach, or the outputs are not '
                f'continuous in the weights; leave such layers out of sites=[...], or check other outputs with step=...'
            )
        return found

    return compare_both


@torch.no_grad()
def fold_gates(
    model: nn.Module, dynamic: str = 'error', against: Comparison | None = None
) -> tuple[nn.Module, FoldReport]:
    """Fold the constant gates; ``against(model, folded)`` compares before anything is returned."""
    check_bare(model, FoldError)
    check_connected(model)
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, Plugged)}
    check_sites_bare(model, layers, FoldError)
    if not layers:
        name = type(model).__name__
        message = f'{name}: its sites were scaled and have no gates, so it is a stock model; copied as it is'
        if not starts(model):
            message = f'{name} has no plugged sites: it is a stock model or was folded before; copied as it is'
            warn(message)
        return make_stock_(copy_of(model, FoldError)), FoldReport(message=message)
    check_mode(model)
    check_constant(layers, dynamic)
    check_whole(model, layers)
    for path, layer in layers.items():
        check_weights(path, layer, FoldError)
    check_own(model, layers, FoldError)

    folded = copy_of(model, FoldError)
    copies: dict[str, Any] = {path: folded.get_submodule(path) for path in layers}
    computed = {path: scaled_parameters(path, layer) for path, layer in copies.items() if layer.gate is not None}
    for path, new in computed.items():
        layer = copies[path]
        layer.weight.copy_(new.weight)
        if new.bias is not None:
            layer.bias.copy_(new.bias)
        if new.site.kept:
            layer.gate = None
        else:
            detach(layer)
    for module in folded.modules():
        uninstall(module)
        release(module)
    unregister(folded, units_in_use(folded))
    sites = tuple(new.site for new in computed.values())
    left = [path for path, layer in layers.items() if layer.dynamic is not None]
    if left:
        keep_dynamic(folded, set(left))
        message = (
            f'folded {len(sites)} sites of {type(model).__name__}; input-dependent gates are still plugged at '
            f'{some(left, 3)}'
        )
    else:
        make_stock_(folded)
        message = f'folded {len(sites)} sites of {type(model).__name__}'
    checked = None if against is None else against(model, folded)
    warn_saturated(sites)
    return folded, FoldReport(sites, message, specs(model), checked=checked)


def warn_saturated(sites: Iterable[FoldedSite]) -> None:
    """Name the sites whose gates are all closed or all open: they fold, but a training rarely means to end there."""
    by_state: dict[str, list[str]] = {}
    for site in sites:
        if site.saturated:
            by_state.setdefault(site.saturated, []).append(site.path)
    for state, paths in by_state.items():
        warn(
            f'{some(paths)}: the gates of all channels {state}; the folded layer does no more than that: look at the '
            f'training (learning rate, weight decay, loss) before you ship it'
        )


def specs(model: nn.Module) -> dict[str, Any]:
    """Specs of the plugs: path of the plugged model or part -> its specs."""
    return {path: m.plug_spec for path, m in model.named_modules() if 'plug_spec' in vars(m)}


def check_mode(model: nn.Module) -> None:
    """Refuse training mode."""
    training = [path for path, m in model.named_modules() if m.training and isinstance(m, Plugged)]
    if model.training or training:
        where = 'the model' if model.training else training[0]
        raise FoldError(f'{where} is in training mode: call model.eval() first (folded weights are for inference)')


def check_constant(layers: dict[str, Any], dynamic: str) -> None:
    """Refuse input-dependent gates, unless they are to be kept."""
    varying = [path for path, layer in layers.items() if layer.dynamic is not None]
    if varying and dynamic == 'error':
        names = sorted({attention_name(g) for path in varying for g in layers[path].dynamic})
        raise FoldError(
            f'the gates of {", ".join(names)} at {some(varying, 3)} depend on the input and have no exact fold; '
            f"train with dict(type='ASR', ...) for constant gates, fold only the constant ones with dynamic='keep', or "
            f'replace them by their mean over data with calibrate=loader'
        )


def check_whole(model: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse to keep gates in a part of a model whose shared units lie outside of the part."""
    inside = {id(m) for m in model.modules()}
    for path, layer in layers.items():
        for gate in layer.dynamic or ():
            if (unit := gate.site_attention.unit) is not None and id(unit) not in inside:
                raise FoldError(
                    f'{path}: stays plugged, but shares an attention that is registered outside of this '
                    f'{type(model).__name__}; fold the whole model that was plugged'
                )


def constants_of(path: str, layer: Any) -> Constants:
    """Constants of a plugged layer in float64: what its constant gates and shifts come to; None where there are none.

    `asr_downstream.modules.affine.scaled` of the stock layer and these gives the folded parameters, to the bit once
    they are rounded.

    Args:
        path: of the layer, for messages.
        layer: of a copy of the model: its gates, and the attentions that they share with others, become float64.

    Raises:
        FoldError: gates that cannot be computed in float64, or are not finite.
    """
    if layer.gate is None:
        return Constants()
    try:
        for gate in layer.gate:
            for module in (gate, *gate.site_attention.parts()):
                module.double()
        constants = layer.constants()
    except RuntimeError as error:
        raise FoldError(
            f'{path}: its gates cannot be computed in float64 ({str(error).strip().splitlines()[0]}); fold before '
            f'gates are quantised or converted'
        ) from error
    for what, value in (('gates', constants.gate), ('shifts', constants.shift), ('gates', constants.inputs)):
        if value is not None and not value.isfinite().all():
            raise FoldError(
                f'{path}: {int((~value.isfinite()).sum())} of {value.numel()} {what} are not finite: the training '
                f'diverged; take an earlier one'
            )
    return constants


def scaled_parameters(path: str, layer: Any) -> ScaledParameters:
    """Compute the folded weight and bias of one site, see `constants_of`; rounded once, at the end."""
    constants = constants_of(path, layer)
    weight, bias = scaled(layer, constants)
    outputs = [gate for gate in layer.gate if gate.side == OUTPUT]
    inputs = [gate for gate in layer.gate if gate.side == INPUT]
    found = [(v, gates) for v, gates in ((constants.gate, outputs), (constants.inputs, inputs)) if v is not None]
    v = torch.cat([v for v, _ in found])
    rounded = {'weight': weight.to(layer.weight.dtype)}
    if bias is not None:
        rounded['bias'] = bias.to(layer.bias.dtype)
    rounding = 0.0
    for name, value in rounded.items():
        target = weight if name == 'weight' or bias is None else bias
        if not value.isfinite().all():
            raise FoldError(
                f'{path}: the folded {name} is not finite in {value.dtype}; '
                f'the stock {name} is damaged or too large for this precision: fold in float32'
            )
        rounding = max(rounding, float((value.double() - target).abs().max() / target.abs().max().clamp_min(1e-300)))
    site = FoldedSite(
        path=path,
        layer=layer.stock.__name__,
        channels=v.numel(),
        gate_min=float(v.min()),
        gate_mean=float(v.mean()),
        gate_max=float(v.max()),
        rounding=rounding,
        kept=layer.dynamic is not None,
        saturated=next(filter(None, (saturation(gates, v) for v, gates in found)), ''),
        side=side_of(layer.gate),
        shift=None if constants.shift is None else float(constants.shift.abs().max()),
    )
    return ScaledParameters(rounded['weight'], rounded.get('bias'), site)


def units_in_use(model: nn.Module) -> set[int]:
    """Ids of the shared units that gates of ``model`` still use."""
    gates = (m for m in model.modules() if isinstance(m, Gate))
    return {id(unit) for gate in gates if (unit := gate.site_attention.unit) is not None}


def make_stock_(model: nn.Module) -> nn.Module:
    """Give back their stock class to modules that an adapter has subclassed (attribute ``stock_class``), in place."""
    for module in model.modules():
        release(module)
        forget(module)
        stock = getattr(type(module), 'stock_class', None)
        if stock is not None:
            module.__class__ = stock
    return model
