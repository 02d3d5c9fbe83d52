"""What of each detector is exported, found out by doing it: the table of the documentation.

Each is built small, with random weights, as `fold` ships it, and exported with the digits as its data.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config

from asr_downstream.commands.exporting.kinds import kind_of
from asr_downstream.commands.exporting.kinds.base import Request
from asr_downstream.commands.exporting.run import export
from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.errors import AsrError
from asr_downstream.files.ready import ROOT

__all__ = ['CASES', 'markdown', 'measure']

# One of each family of det_configs: the stock one, which is what a folded one is.
CASES = (
    'retinanet/retinanet_r50_fpn_1x_coco', 'rtmdet/rtmdet_s_8xb32-300e_coco', 'atss/atss_r50_fpn_1x_coco',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'gfl/gfl_r50_fpn_1x_coco', 'yolox/yolox_s_8xb8-300e_coco',
    'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'rtmdet/rtmdet-ins_s_8xb32-300e_coco', 'detr/detr_r50_8xb2-150e_coco',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco', 'dino/dino-4scale_r50_8xb2-12e_coco',
)  # fmt: skip
SIDE = 160  # pixels of the images
DISTANCES = re.compile(r'reg(\.\d+)?\.bias$')


def small(config: Config) -> Config:
    """Narrow the backbone, resize images to `SIDE`, and ask for boxes alone, in place."""
    model = config.model
    if model.backbone.type.endswith('ResNet'):
        factor = model.backbone.get('base_channels', 64) // 8
        model.backbone.base_channels = 8
        model.neck.in_channels = [width // factor for width in model.neck.in_channels]

    def resize(node: Any) -> None:
        if isinstance(node, dict):
            for key, kind in (('scale', 'Resize'), ('size', 'Pad')):
                if node.get('type') == kind and key in node:
                    node[key] = (SIDE, SIDE)
            if node.get('with_mask'):
                node['with_mask'] = False  # the digits have none
            node = list(node.values())
        for part in node if isinstance(node, list | tuple) else ():
            resize(part)

    resize(config.test_dataloader.dataset.pipeline)
    return config


@torch.no_grad()
def spread(model: Any) -> None:
    """Give batch norms the statistics of noise: the features of a fresh MobileNet fade, and all boxes get one score."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model.extract_feat(torch.randn(16, 3, SIDE, SIDE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def ship(case: str, data: Path, folder: Path) -> Path:
    """Write a detector as `fold` does, with random weights."""
    config = stock_config(small(load_config(ROOT / 'det_configs' / f'{case}.py', data)))
    torch.manual_seed(0)
    model = build_detector(config)
    if 'mobilenet' in case:
        spread(model)
    for name, value in model.named_parameters():
        if name == 'level_embed':
            torch.nn.init.normal_(value)  # of Deformable DETR: memory as it was found
        if name.endswith('bias') and value.numel() and value.max() < -1:
            torch.nn.init.zeros_(value)  # what makes fresh scores too low to be detections
        elif DISTANCES.search(name):
            torch.nn.init.ones_(value)  # distances to edges, of which fresh ones are negative: boxes without area
    (folder / 'detector.py').write_text(config.pretty_text)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'detector.pth')
    return folder / 'detector.pth'


def measure(cases: Sequence[str] = CASES) -> Iterator[dict[str, Any]]:
    """Export detectors, and yield a row of each."""
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder, said = Path(place), StringIO()
        with redirect_stdout(said):
            make_digits(folder / 'digits', sizes={'train': 4, 'val': 4})
        for case in cases:
            row: dict[str, Any] = {'case': case.partition('/')[2]}
            try:
                with redirect_stdout(said):
                    shipped = ship(case, folder / 'digits', folder)
                    subject = kind_of(shipped).open(Request(shipped, folder / 'digits', 4))
                    receipt = export(subject, ['onnx', 'pt2'], folder / 'out')
                row['found'] = receipt.as_dict()
                row['outputs'] = subject.names()
            except AsrError as error:
                row['reason'] = str(error)
            yield row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Table of the documentation."""
    lines = [
        '| detector | raw outputs | difference, ONNX | may vary | one file, `detector.onnx` |',
        '|---|---|---|---|---|',
    ]
    for row in rows:
        if 'found' not in row:
            lines.append(f'| `{row["case"]}` | no: {row["reason"]} | | | |')
            continue
        found = row['found']
        free = [text.partition(',')[0] for axes in found['varies'].values() for text in axes.values()]
        head = 'feature maps, head' if any(name.startswith('head') for name in row['outputs']) else 'feature maps'
        whole = found['exports'].get('detector.onnx')
        last = found.get('whole', '') if whole is None else f'yes, boxes within {whole["boxes_px"]:.0e} px'
        relative = found['exports']['model.onnx']['relative']
        lines.append(f'| `{row["case"]}` | {head} | {relative:.0e} | {", ".join(free)} | {last} |')
    return '\n'.join(lines)
