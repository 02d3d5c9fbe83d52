"""Detectors: built from a config, filled from a checkpoint, compared on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from asr_downstream.detection.config import REMOVED, model_of
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.native.rebuild import remove_native
from asr_downstream.folding.verify import Verification, verify
from asr_downstream.plugging.weights import check_weights_finite, load_state

__all__ = ['FeatureMaps', 'build_detector', 'compare_features', 'load_detector']


def build_detector(config: Config) -> nn.Module:
    """Build the detector of a config in eval mode, with random weights."""
    model = MODELS.build(model_of(config))
    remove_native(model, config.get(REMOVED, ()))
    model.eval()
    return model


def load_detector(config: Config, path: Path, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Build the detector of a config and load a checkpoint strictly.

    Returns:
        The detector in eval mode, and the checkpoint's ``meta``.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or does not fit, or its weights are not finite.
    """
    checkpoint = read_checkpoint(path, trust)
    state = state_dict_of(checkpoint, path)
    model = build_detector(config)
    check_weights_finite(state, path, model)
    load_state(model, state, path)
    meta = dict(checkpoint.get('meta') or {})
    model.dataset_meta = meta.get('dataset_meta')  # type: ignore[assignment]
    return model, meta


class FeatureMaps(nn.Module):
    """A detector up to its neck: images ``(B, 3, H, W)`` -> feature maps. Continuous, unlike what follows NMS."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.training = detector.training

    def forward(self, x: Tensor) -> Any:
        return self.detector.extract_feat(x)  # type: ignore[operator]


def compare_features(a: nn.Module, b: nn.Module, size: int = 160, seed: int = 0) -> Verification:
    """Largest difference of the feature maps of two detectors on two random images, in the precision of ``b``."""
    example = next(b.parameters())
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return verify(FeatureMaps(a), FeatureMaps(b), x.to(example.device, example.dtype))
