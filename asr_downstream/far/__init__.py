"""FAR: self-attention replaced by multi-head LSTMs that are distilled from it, then pruned (arXiv 2505.21535)."""

from asr_downstream.far.description import describe
from asr_downstream.far.lstm import MultiHeadLSTM
from asr_downstream.far.replacing import replace

__all__ = ['MultiHeadLSTM', 'describe', 'replace']
