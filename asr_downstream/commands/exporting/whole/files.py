"""Whole detectors as files: written, compared with MMDetection, and run in its place over its test set."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image, ImageOps
from torch import nn
from torch.export import Dim

from asr_downstream.commands.exporting.formats import LARGEST, facts_of, open_session, quiet, write_onnx
from asr_downstream.commands.exporting.quantise import quantise
from asr_downstream.commands.exporting.receipt import BOXES, Entry
from asr_downstream.commands.exporting.whole.decode import INPUTS, OUTPUTS, Candidates
from asr_downstream.commands.exporting.whole.graphs import pixels_graph, whole_graph
from asr_downstream.commands.exporting.whole.plan import NotWhole, Plan
from asr_downstream.detection.evaluation.compare import RARE, Differences, differences
from asr_downstream.detection.evaluation.evaluate import Detections, detect
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import first_line, sha256
from asr_downstream.measure.timing import paired_times, ratio

__all__ = ['WHOLE', 'FileDetector', 'Whole']

WHOLE, WHOLE_INT8 = 'detector.onnx', 'detector.int8.onnx'
TORCH = 'MMDetection, whole'
ROUNDS = 15


def read_image(path: Path | str) -> np.ndarray:
    """Read an image as the file wants it: ``(height, width, 3)``, red, green, blue, 8 bits, turned as it says."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))


class FileDetector(nn.Module):
    """A whole file in the place of a detector of MMDetection: ``test_step`` reads the images of a batch anew.

    Args:
        session: of onnxruntime.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def find(self, image: np.ndarray) -> Detections:
        """Detections in an image."""
        boxes, scores, labels = self.session.run(None, {'image': image})
        return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels)

    def test_step(self, batch: Any) -> list[Any]:
        """Do as MMDetection does."""
        for sample in batch['data_samples']:
            boxes, scores, labels = self.find(read_image(sample.img_path))
            sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        return list(batch['data_samples'])


@dataclass
class Whole:
    """A detector that becomes one file.

    Attributes:
        config: with the test set.
        model: of MMDetection.
        plan: what surrounds its network.
        classes: their names.
        images: of the test set that boxes are compared on and 8 bits are calibrated with, at most.
    """

    config: Any
    model: Any
    plan: Plan
    classes: list[str]
    images: int
    found: dict[str, Detections] = field(default_factory=dict)

    def write(self, folder: Path, threads: int, int8: bool) -> list[Entry]:
        """Write the file into a folder, compare it, and measure it.

        Raises:
            NotWhole: the network with its decoding cannot be traced, or nothing is found that could be compared.
            AsrError: boxes differ.
        """
        with tempfile.TemporaryDirectory() as aside:
            pre, network = Path(aside) / 'pixels.onnx', Path(aside) / 'network.onnx'
            onnx = importlib.import_module('onnx')
            onnx.save(pixels_graph(self.plan), pre)
            self.pixels = open_session(pre, threads)
            self.paths = list(self.first_paths())
            self.write_network(network)
            paths = {WHOLE: network}
            if int8:
                paths[WHOLE_INT8] = Path(aside) / 'int8.onnx'
                quantise(network, paths[WHOLE_INT8], (self.given(path) for path in self.paths))
            for name, part in paths.items():
                about = {'classes': json.dumps(self.classes)}
                onnx.save(whole_graph(self.plan, onnx.load(part), about), folder / name)
        files = {name: FileDetector(open_session(folder / name, threads)) for name in paths}
        try:
            entries = [Entry(TORCH), *(self.entry(folder / name, model) for name, model in files.items())]
        except NotWhole:
            for name in paths:
                (folder / name).unlink()
            raise
        image, sample = read_image(self.paths[0]), self.given(self.paths[0])
        calls: dict[str, Any] = {TORCH: lambda: self.predict(sample, image)}
        calls |= {name: lambda model=model: model.find(image) for name, model in files.items()}
        with torch.no_grad():
            times = paired_times(calls, ROUNDS, 'latency', threads=threads)
        models: dict[str, nn.Module] = {TORCH: self.model, **files}
        detections = {}
        for entry in entries:
            entry.latency_ms = round(median(times[entry.name]), 4)
            entry.ratio = round(ratio(times[entry.name], times[TORCH]).median, 4)
            scores, detections[entry.name], _ = detect(self.config, models[entry.name], entry.name)
            entry.metrics = {key: scores.summary[key] for key in ('AP', 'AP50') if key in scores.summary}
        for entry in entries[1:]:
            entry.facts['to_mmdetection'] = differences(detections[TORCH], detections[entry.name])._asdict()
        return entries

    def first_paths(self) -> Iterator[str]:
        """Images of the test set."""
        data = Runner.build_dataloader({**self.config.test_dataloader, 'num_workers': 0, 'persistent_workers': False})
        for index in range(min(self.images, len(data.dataset))):
            yield data.dataset.get_data_info(index)['img_path']

    def given(self, path: str) -> dict[str, np.ndarray]:
        """What the network is given of an image."""
        return dict(zip(INPUTS, self.pixels.run(None, {'image': read_image(path)}), strict=True))

    def write_network(self, path: Path) -> None:
        """Trace and write the network with its decoding."""
        given = {key: torch.from_numpy(value) for key, value in self.given(self.paths[0]).items()}
        free = {}
        if self.plan.canvas is None and self.plan.keep_ratio:  # else all images become as large as the first
            free = {axis: self.plan.divisor * Dim(name, min=1, max=LARGEST) for axis, name in ((2, 'h'), (3, 'w'))}
        model = Candidates(self.model, self.plan)
        shapes: dict[str, Any] = {'pixels': free, 'size': {}, 'scale': {}}
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
            write_onnx(program, path, OUTPUTS)
        except Exception as error:  # tracing raises anything
            said = first_line(error)[:200]
            raise NotWhole(f'torch.export cannot trace its decoding ({type(error).__name__}: {said})') from error

    @torch.no_grad()
    def predict(self, given: dict[str, np.ndarray], image: np.ndarray) -> Detections:
        """Detections of MMDetection in pixels that were made for it."""
        shape, scale = given['size'], given['scale']
        pixels = torch.from_numpy(given['pixels'])
        about = {
            'img_shape': tuple(map(int, shape)),
            'ori_shape': image.shape[:2],
            'scale_factor': tuple(map(float, scale)),
            'batch_input_shape': tuple(pixels.shape[-2:]),
            'pad_shape': tuple(pixels.shape[-2:]),
        }
        found = self.model.predict(pixels, [DetDataSample(metainfo=about)], rescale=True)[0].pred_instances
        return found.bboxes, found.scores, found.labels

    def entry(self, path: Path, model: FileDetector) -> Entry:
        """Compare the boxes of a file with those of MMDetection, which is given the same pixels.

        Raises:
            AsrError: they differ, and the file is not of 8 bits.
            NotWhole: nothing was found in any image.
        """
        ours: dict[str, Detections] = {}
        for name in self.paths:
            image = read_image(name)
            if name not in self.found:
                self.found[name] = self.predict(self.given(name), image)
            ours[name] = model.find(image)
        apart = differences(self.found, ours)
        if path.name == WHOLE:
            refuse(path, apart)
            if not apart.pairs:
                raise NotWhole(
                    f'nothing is found in the {apart.images} images of the test set, so no box could be compared'
                )
        facts = {**facts_of(path), 'boxes': apart._asdict()}
        if path.name == WHOLE:
            facts['boxes_px'] = apart.boxes_px
        return Entry(path.name, None, path.stat().st_size, sha256(path), facts=facts)


def refuse(path: Path, apart: Differences) -> None:
    """Refuse a file that finds something else.

    Raises:
        AsrError: see above.
    """
    if not apart.boxes_px <= BOXES or not apart.scores <= BOXES or apart.unmatched > RARE * apart.images:
        raise AsrError(
            f'{path.name}: its boxes differ from those of MMDetection by {apart.boxes_px:.2g} px, scores by '
            f'{apart.scores:.2g}, and in {apart.unmatched} of {apart.images} images others are found; allowed are '
            f'{BOXES:g} px; nothing was written'
        )
