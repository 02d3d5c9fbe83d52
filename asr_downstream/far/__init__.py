"""FAR: self-attention replaced by multi-head LSTMs that are distilled from it, then pruned (arXiv 2505.21535)."""

from asr_downstream.far.export import load_far, save_far
from asr_downstream.far.model.autotune import tune
from asr_downstream.far.model.describe import describe
from asr_downstream.far.model.lstm import MultiHeadLSTM
from asr_downstream.far.model.replace import replace
from asr_downstream.far.prune.budgets import Budget, cut

__all__ = ['Budget', 'MultiHeadLSTM', 'cut', 'describe', 'load_far', 'replace', 'save_far', 'tune']
