"""Deep copies of models and inputs that a plain `copy.deepcopy` refuses or gets wrong."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from asr_downstream.errors import AsrError
from asr_downstream.leaves import leaves

__all__ = ['copy_of']


def copy_of(value: Any, error: type[AsrError] = AsrError) -> Any:
    """Copy a model or nested inputs.

    Tensors that were computed with gradients (priors made from an embedding, weights under ``weight_norm``), which
    torch does not copy, are copied without their graph.

    Raises:
        AsrError: of type ``error``: something in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for _, leaf in leaves(value, '', exhaust=False):
        if isinstance(leaf, Tensor) and not leaf.is_leaf:
            memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except AsrError:
        raise
    except Exception as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
        raise error(
            f'{type(value).__name__}: cannot be copied ({first}); take out what holds it (hooks, open files, locks), '
            f'or load the weights into a fresh model first'
        ) from cause
