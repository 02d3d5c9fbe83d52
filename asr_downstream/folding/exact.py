"""`fold`: put constant gates into the weights of their layers; what comes back is the stock model.

The arithmetic is the plugged layer's own ``scale``, evaluated once in float64 and cast back once. All new weights are
computed and checked before the first one is stored, and they are stored in a copy, so a failure changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, FoldError
from asr_downstream.folding import calibrated as calibration
from asr_downstream.folding.calibrated import Calibration, Metric
from asr_downstream.folding.constancy import Step, groups
from asr_downstream.folding.verify import Verification, beyond_rounding, check_inputs, compare, run
from asr_downstream.modules.check import check_bare, check_module, check_own, check_sites_bare, check_weights
from asr_downstream.modules.copies import copy_of
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.describe import attention_name, check_connected
from asr_downstream.plugging.gates import Gate, saturation
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.save import forget, keep_dynamic
from asr_downstream.plugging.shared_unit import Member, unregister

__all__ = ['FoldReport', 'FoldedSite', 'fold', 'make_stock_']


@dataclass(frozen=True)
class FoldedSite:
    """What happened at one site.

    Attributes:
        path: name in ``named_modules()``.
        layer: name of the stock class.
        channels: number of gates.
        gate_min, gate_mean, gate_max: of the constant gates that were folded.
        rounding: largest difference between the folded weight or bias and its float64 value, over the largest
            magnitude; half a unit in the last place of the dtype, or less.
        kept: input-dependent gates stay at this site (``dynamic='keep'``).
        saturated: what is odd about the gates, if all of them are at one end, see
            `asr_downstream.plugging.gates.saturation`.
    """

    path: str
    layer: str
    channels: int
    gate_min: float
    gate_mean: float
    gate_max: float
    rounding: float
    kept: bool = False
    saturated: str = ''


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did.

    Attributes:
        sites: the folded sites, in the order of ``named_modules()``.
        message: one line for a person.
        spec: what was plugged.
        calibration: what ``fold(calibrate=...)`` measured.
        checked: what ``fold(check=...)`` found, plugged against folded.
    """

    sites: tuple[FoldedSite, ...] = ()
    message: str = ''
    spec: Any = field(default=None, compare=False)
    calibration: Calibration | None = field(default=None, compare=False)
    checked: Verification | None = field(default=None, compare=False)

    @property
    def already_stock(self) -> bool:
        """There was nothing to fold."""
        return not self.sites and self.calibration is None

    def __str__(self) -> str:
        return self.message if self.calibration is None else f'{self.calibration}\n{self.message}'


@dataclass(frozen=True)
class ScaledParameters:
    weight: Tensor
    bias: Tensor | None
    site: FoldedSite


def fold(
    model: nn.Module,
    dynamic: str = 'error',
    calibrate: Iterable[Any] | None = None,
    *,
    step: Step | None = None,
    refine_norms: bool = False,
    metric: Metric | None = None,
    max_drop: float | None = None,
    check: Any = None,
) -> tuple[nn.Module, FoldReport]:
    """Fold the gates of ``model`` and return a stock copy.

    Constant gates fold exactly, up to one rounding of the weights: classes, parameter names and buffers are those of
    the stock model. A model without plugs is copied, with a warning: folding twice is harmless.

    Gates that depend on the input have no exact fold. With ``calibrate`` they are replaced by their mean over data; the
    report then says how constant they were and how much the model has changed.

    Args:
        model: a plugged model in eval mode; it is not changed.
        dynamic: what to do with gates that depend on the input: ``'error'``, or ``'keep'`` them plugged (the paper's
            ASR + SE keeps the SE).
        calibrate: batches to average the gates over: a list or a loader, read more than once, on the model's device.
        step: how to run a batch, ``step(model, batch)``; its outputs are compared before and after. The default calls
            the model with a tensor, a tuple of arguments or a dict of keyword arguments.
        refine_norms: estimate the running statistics of all batch norms again, over the same data.
        metric: of a model, larger is better; measured before and after.
        max_drop: how much may be lost at most: of ``metric``, or without one the relative change of the outputs (root
            mean square). The least constant sites stay unfolded until it holds; sites of one recurrent unit go
            together.
        check: inputs to compare the plugged model and the folded one on, as `asr_downstream.verify` takes them, or
            batches for ``step``. Folding is exact as far as layers go; a model that reads the weight of a site past
            its layer, ``F.conv2d(x, self.conv.weight)``, is only found out by running it. With ``calibrate`` the
            constant gates, and the means in place of the others, are compared with what they fold to.

    Returns:
        The folded copy and a report. Gates that are all at one end are named in a warning.

    Raises:
        FoldError: training mode, gates that depend on the input, gates or folded weights that are not finite, weights
            that are shared with another layer, computed from others, quantised, sharded or on the meta device, gates
            that a converter has disconnected, or with ``check`` a folded model that computes something else. The model
            has not been touched.
    """
    check_module(model, 'fold', FoldError)
    if dynamic not in ('error', 'keep'):
        raise FoldError(f"fold: dynamic={dynamic!r} is not known, use 'error' or 'keep'")
    finish = partial(fold_exactly, check=comparison(check, step))
    if calibrate is None:
        if (step is not None and check is None) or refine_norms or metric is not None or max_drop is not None:
            raise FoldError('fold: step, refine_norms, metric and max_drop belong to calibrate=...')
        return finish(model, dynamic)
    check_bare(model, FoldError)
    calibration.check_arguments(calibrate, step, refine_norms, metric, max_drop)
    check_connected(model)
    check_mode(model)
    if not groups(model):
        if refine_norms or metric is not None or max_drop is not None:
            warnings.warn(
                'all gates are constant and fold exactly: refine_norms, metric and max_drop are not used', stacklevel=2
            )
        return finish(model, dynamic)
    keep = partial(finish, dynamic='keep')
    folded, report, found = calibration.calibrate(model, calibrate, keep, step, refine_norms, metric, max_drop)
    return folded, replace(report, calibration=found)


Check: TypeAlias = Callable[[nn.Module, nn.Module], Verification] | None


def comparison(check: Any, step: Step | None) -> Check:
    """What compares the plugged and the folded model on the inputs that the user gave; None without any."""
    if check is None:
        return None
    try:
        check_inputs(check, 'fold: check')
    except AsrError as error:
        raise FoldError(str(error)) from None

    def against(plugged: nn.Module, folded: nn.Module) -> Verification:
        calls = check if isinstance(check, list) else [check]
        calibration.settle(plugged)
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

    return against


@torch.no_grad()
def fold_exactly(model: nn.Module, dynamic: str, check: Check = None) -> tuple[nn.Module, FoldReport]:
    """Fold the constant gates."""
    check_bare(model, FoldError)
    check_connected(model)
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, Plugged)}
    check_sites_bare(model, layers, FoldError)
    if not layers:
        message = (
            f'{type(model).__name__} has no plugged sites: it is a stock model or was folded before; copied as it is'
        )
        warnings.warn(message, stacklevel=4)
        return make_stock_(copy_of(model, FoldError)), FoldReport(message=message)
    check_mode(model)
    check_constant(layers, dynamic)
    check_whole(model, layers)
    for path, layer in layers.items():
        check_weights(path, layer, FoldError)
    check_own(model, layers, FoldError)

    folded = copy_of(model, FoldError)
    copies: dict[str, Any] = {path: folded.get_submodule(path) for path in layers}
    scaled = {path: scaled_parameters(path, layer) for path, layer in copies.items() if layer.gate is not None}
    for path, new in scaled.items():
        layer = copies[path]
        layer.weight.copy_(new.weight)
        if new.bias is not None:
            layer.bias.copy_(new.bias)
        if new.site.kept:
            layer.gate = None
        else:
            detach(layer)
    unregister(folded, units_in_use(folded))
    sites = tuple(new.site for new in scaled.values())
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
    checked = None if check is None else check(model, folded)
    warn_saturated(sites)
    return folded, FoldReport(sites, message, specs(model), checked=checked)


def warn_saturated(sites: Iterable[FoldedSite]) -> None:
    """Name the sites whose gates are all at one end: what they do is legal, and hardly ever meant."""
    by_state: dict[str, list[str]] = {}
    for site in sites:
        if site.saturated:
            by_state.setdefault(site.saturated, []).append(site.path)
    for state, paths in by_state.items():
        warnings.warn(
            f'{some(paths)}: the gates of all channels {state}; the folded layer does no more than that: look at the '
            f'training (learning rate, weight decay, loss) before you ship it',
            stacklevel=5,
        )


def specs(model: nn.Module) -> dict[str, Any]:
    """What was plugged: path of the plugged (sub)model -> its spec."""
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
            if isinstance(gate.attention, Member) and id(gate.attention.unit) not in inside:
                raise FoldError(
                    f'{path}: stays plugged, but shares an attention that is registered outside of this '
                    f'{type(model).__name__}; fold the whole model that was plugged'
                )


def scaled_parameters(path: str, layer: Any) -> ScaledParameters:
    """Compute the folded weight and bias of one site in float64; changes only the precision of its gates."""
    try:
        for gate in layer.gate:
            for module in (gate, *chain_of(gate)):
                module.double()
        v = layer.constant()
    except RuntimeError as error:
        raise FoldError(
            f'{path}: its gates cannot be computed in float64 ({str(error).strip().splitlines()[0]}); fold before '
            f'gates are quantised or converted'
        ) from error
    if not v.isfinite().all():
        raise FoldError(
            f'{path}: {int((~v.isfinite()).sum())} of {v.numel()} gates are not finite: the training diverged; '
            f'take an earlier one'
        )
    weight, bias = layer.scale(layer, v)  # float32 times float64 is computed in float64
    rounded = {'weight': weight.to(layer.weight.dtype)}
    if bias is not None:
        rounded['bias'] = bias.to(layer.bias.dtype)
    rounding = 0.0
    for name, value in rounded.items():
        target = weight if name == 'weight' else bias
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
        saturated=saturation(list(layer.gate), v),
    )
    return ScaledParameters(rounded['weight'], rounded.get('bias'), site)


def chain_of(gate: Gate) -> list[nn.Module]:
    """What the gates of a site depend on besides itself: a shared unit and the sites before it."""
    if not isinstance(gate.attention, Member):
        return []
    return [gate.attention.unit, *gate.attention.run]


def units_in_use(model: nn.Module) -> set[int]:
    """Ids of the shared units that gates of ``model`` still ask."""
    gates = (m for m in model.modules() if isinstance(m, Gate))
    return {id(gate.attention.unit) for gate in gates if isinstance(gate.attention, Member)}


def make_stock_(model: nn.Module) -> nn.Module:
    """Give back their stock class to modules that an adapter has subclassed (attribute ``stock_class``), in place."""
    for module in model.modules():
        forget(module)
        stock = getattr(type(module), 'stock_class', None)
        if stock is not None:
            module.__class__ = stock
    return model
