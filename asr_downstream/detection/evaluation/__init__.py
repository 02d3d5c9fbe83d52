"""COCO scores, folded copies beside their originals, calibration, pictures, tables."""

from asr_downstream.detection.extra import load

load()
