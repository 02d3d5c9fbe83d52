"""Readers of folders, in the order in which they are asked."""

from __future__ import annotations

from asr_downstream.commands.reports.readers.ablation import Ablation
from asr_downstream.commands.reports.readers.analysis import Analysis
from asr_downstream.commands.reports.readers.base import Reader
from asr_downstream.commands.reports.readers.classification import Classification
from asr_downstream.commands.reports.readers.demo import Demo
from asr_downstream.commands.reports.readers.detection import Detection
from asr_downstream.commands.reports.readers.diffusion import Diffusion
from asr_downstream.commands.reports.readers.far import Far

__all__ = ['READERS', 'Reader']

READERS: tuple[Reader, ...] = (Ablation(), Demo(), Analysis(), Far(), Classification(), Detection(), Diffusion())
