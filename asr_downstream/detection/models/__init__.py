"""Detectors with a plug, with LSTMs in the place of attention, or with a teacher."""

from asr_downstream.detection import extra  # noqa: F401
from asr_downstream.detection.models import mmdet_patches  # noqa: F401
