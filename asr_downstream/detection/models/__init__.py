"""Detectors with a plug, with LSTMs in the place of attention, or with a teacher."""

from asr_downstream.detection.extra import load

load()
