"""`fold`, as users call it: exact, or with ``calibrate=`` the short form of `fold_calibrated`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from asr_downstream.errors import FoldError
from asr_downstream.folding.calibrated import Metric, fold_calibrated
from asr_downstream.folding.exact import check_dynamic, fold_exactly
from asr_downstream.folding.passes import Step
from asr_downstream.folding.report import FoldReport
from asr_downstream.modules.check import check_module

__all__ = ['fold']


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

    Gates that depend on the input have no exact fold. `fold_calibrated` replaces them by their mean over data, and
    ``calibrate=batches`` is its short form; the report then says how constant they were and how much the model has
    changed.

    Args:
        model: a plugged model in eval mode; it is not changed.
        dynamic: what to do with gates that depend on the input: ``'error'``, or ``'keep'`` them plugged (the paper's
            ASR + SE keeps the SE); not with ``calibrate``.
        calibrate: batches to average the gates over: a list or a loader, read more than once, on the model's device.
        step: how to run a batch of ``calibrate`` or ``check``, ``step(model, batch)``.
        refine_norms: with ``calibrate``; this and the next two as in `asr_downstream.fold_calibrated`.
        metric: with ``calibrate``; of a model, larger is better.
        max_drop: with ``calibrate``; how much of the metric, or of the outputs, may be lost at most.
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
    check_dynamic(dynamic)
    if calibrate is None:
        if (step is not None and check is None) or refine_norms or metric is not None or max_drop is not None:
            raise FoldError('fold: step, refine_norms, metric and max_drop belong to calibrate=...')
        return fold_exactly(model, dynamic, step=step, check=check)
    if dynamic != 'error':
        raise FoldError(
            f'fold: dynamic={dynamic!r} leaves gates that depend on the input plugged, and calibrate=... folds them; '
            f'leave out one of the two, or give max_drop=... to keep the least constant sites plugged'
        )
    return fold_calibrated(
        model, calibrate, step=step, refine_norms=refine_norms, metric=metric, max_drop=max_drop, check=check
    )
