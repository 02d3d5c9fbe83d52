"""FAR: self-attention replaced by multi-head LSTMs that are distilled from it, then pruned (arXiv 2505.21535).

A name is imported when it is first used, as in `asr_downstream`.
"""

import sys
from typing import TYPE_CHECKING

from asr_downstream.console.lazy import attach

if TYPE_CHECKING:
    from asr_downstream.far.export import load_far, save_far
    from asr_downstream.far.model.autotune import tune
    from asr_downstream.far.model.describe import describe
    from asr_downstream.far.model.lstm import MultiHeadLSTM
    from asr_downstream.far.model.replace import replace
    from asr_downstream.far.prune.budgets import Budget, cut

__all__ = ['Budget', 'MultiHeadLSTM', 'cut', 'describe', 'load_far', 'replace', 'save_far', 'tune']

# Module -> the public names that it defines.
DEFINED_IN = {
    'export': ('load_far', 'save_far'),
    'model.autotune': ('tune',),
    'model.describe': ('describe',),
    'model.lstm': ('MultiHeadLSTM',),
    'model.replace': ('replace',),
    'prune.budgets': ('Budget', 'cut'),
}

if not TYPE_CHECKING:  # a type checker that saw __getattr__ would find every misspelt name
    __getattr__, __dir__ = attach(sys.modules[__name__], DEFINED_IN)
