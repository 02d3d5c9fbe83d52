"""Adapters: what gates, shifts and heads have learnt, as a file of some kilobytes beside a base that stays as it is.

    save_gates(model, path)              write what a plugged model has learnt
    apply_gates(stock, path)             a stock model with an adapter in its weights, or with several
    list_gates(path)                     what a file holds
    load_gates(model, path)              put it into a plugged model, to train on
    unload(model)                        take the gates off again: the base, bit for bit

Applying and listing need torch and safetensors only; a name is imported when it is first used.
"""

import sys
from typing import TYPE_CHECKING

from asr_downstream.console.lazy import attach

if TYPE_CHECKING:
    from asr_downstream.folding.adapters.apply import apply_gates
    from asr_downstream.folding.adapters.base import Base, remember
    from asr_downstream.folding.adapters.file import list_gates
    from asr_downstream.folding.adapters.load import load_gates, unload
    from asr_downstream.folding.adapters.save import save_gates

__all__ = ['Base', 'apply_gates', 'list_gates', 'load_gates', 'remember', 'save_gates', 'unload']

# Module -> the public names that it defines.
DEFINED_IN = {
    'apply': ('apply_gates',),
    'base': ('Base', 'remember'),
    'file': ('list_gates',),
    'load': ('load_gates', 'unload'),
    'save': ('save_gates',),
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(sys.modules[__name__], DEFINED_IN)
