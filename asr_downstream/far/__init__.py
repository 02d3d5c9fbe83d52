"""FAR: self-attention replaced by multi-head LSTMs that are distilled from it, then pruned (arXiv 2505.21535)."""

from asr_downstream.far.budgets import Budget, cut
from asr_downstream.far.description import describe
from asr_downstream.far.lstm import MultiHeadLSTM
from asr_downstream.far.replacing import replace
from asr_downstream.far.shipping import load_far, save_far
from asr_downstream.far.tuning import tune

__all__ = ['Budget', 'MultiHeadLSTM', 'cut', 'describe', 'load_far', 'replace', 'save_far', 'tune']
