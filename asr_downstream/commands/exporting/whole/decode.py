"""The network of a detector with decoding: from a normalised image to the candidates that NMS chooses from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.commands.exporting.whole.plan import Plan

__all__ = ['INPUTS', 'OUTPUTS', 'Candidates']

INPUTS = ('pixels', 'size', 'scale')
OUTPUTS = ('candidate_boxes', 'candidate_places', 'candidate_scores', 'candidate_labels')
NONE = -1.0  # score of what is no candidate


class Candidates(nn.Module):
    """A detector from image to candidates, as `BaseDenseHead` chooses them, but of a fixed number.

    Args:
        detector: of MMDetection.
        plan: how candidates are chosen.
    """

    def __init__(self, detector: Any, plan: Plan) -> None:
        super().__init__()
        self.detector, self.plan = detector, plan
        self.train(False)

    def forward(self, pixels: Tensor, size: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Find candidates.

        Args:
            pixels: normalised and padded, ``(1, 3, H, W)``.
            size: height and width before the padding by the divisor.
            scale: of width and height, to the image as it was.

        Returns:
            Boxes in pixels of the image as it was, ``(1, N, 4)``; the same, each class in a place of its own; scores
            ``(1, 1, N)``; labels ``(N,)``.
        """
        head = self.detector.bbox_head
        scores, boxes, *factors = head(self.detector.extract_feat(pixels))
        shapes = [level.shape[-2:] for level in scores]
        priors = head.prior_generator.grid_priors(shapes, dtype=pixels.dtype, device=pixels.device)
        found = [
            self.of_level(*level)
            for level in zip(scores, boxes, factors[0] if factors else [None] * len(scores), priors, strict=True)
        ]
        values, labels, deltas, anchors = (torch.cat(parts) for parts in zip(*found, strict=True))
        decoded = head.bbox_coder.decode(anchors, deltas)
        decoded = getattr(decoded, 'tensor', decoded)
        if getattr(head.bbox_coder, 'clip_border', True):
            limit = size.flip(0).repeat(2)
            decoded = torch.minimum(decoded.clamp(min=0), limit)
        decoded = decoded / scale.repeat(2)
        if self.plan.smallest >= 0:
            sides = decoded[:, 2:] - decoded[:, :2]
            values = torch.where((sides > self.plan.smallest).all(dim=1), values, NONE)
        places = decoded
        if self.plan.by_class:
            far = torch.where(values[:, None] > 0, decoded, 0.0).max() + 1
            places = decoded + labels[:, None].to(decoded.dtype) * far
        return decoded[None], places[None], values[None, None], labels

    def of_level(self, scores: Tensor, boxes: Tensor, factors: Tensor | None, priors: Tensor) -> tuple[Tensor, ...]:
        """Choose candidates of one feature map: scores, labels, predicted boxes, priors."""
        head, most = self.detector.bbox_head, self.plan.per_level
        flat = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        flat = flat.sigmoid() if head.use_sigmoid_cls else flat.softmax(-1)[:, :-1]
        classes = flat.shape[1]
        flat = flat.flatten()
        flat = torch.where(flat > self.plan.score_threshold, flat, NONE)
        values, chosen = torch.cat([flat, flat.new_full((most,), NONE)]).topk(most)
        chosen = torch.where(values > NONE, chosen, 0)
        anchor, label = chosen // classes, chosen % classes
        if factors is not None:
            factor = factors[0].permute(1, 2, 0).reshape(-1).sigmoid()[anchor]
            values = torch.where(values > NONE, values * factor, NONE)
        deltas = boxes[0].permute(1, 2, 0).reshape(-1, 4)[anchor]
        return values, label, deltas, priors[anchor]
