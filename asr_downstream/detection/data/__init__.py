"""Detection data: COCO, VOC and the digits, checked, and configs that fit them."""

from asr_downstream.detection.extra import load

load()
