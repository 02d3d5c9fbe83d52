"""Calibrated folding of detectors: gates averaged over training images, and AP before and after."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from torch import nn

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.console.text import some
from asr_downstream.detection.evaluation.evaluate import evaluate
from asr_downstream.errors import DataError, FoldError
from asr_downstream.folding.calibrated import fold_calibrated
from asr_downstream.folding.report import FoldReport
from asr_downstream.modules.slots import HasGates
from asr_downstream.plugging.describe import describe

__all__ = [
    'CalibrationPlan',
    'ImageBatches',
    'calibration_batches',
    'check_exact',
    'check_reached',
    'fold_over_images',
    'preprocessed_features',
    'step_of',
    'training_images',
]


@dataclass(frozen=True)
class CalibrationPlan:
    """How to fold by calibration.

    Attributes:
        images: number of training images to average the gates over.
        refine_norms: estimate the batch norm statistics again, over the same images.
        max_drop: most AP, in [0, 1], that may be lost; the least constant sites stay plugged until it holds.
        evaluate: measure AP before and after; needed for ``max_drop``.
        seed: of the choice of images.
    """

    images: int = 64
    refine_norms: bool = False
    max_drop: float | None = None
    evaluate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise DataError(f'calibration needs at least 1 image, not {self.images}')


class ImageBatches(Sequence[Any]):
    """Batches of images of a data set, loaded when they are asked for.

    Args:
        dataset: of MMDetection.
        collate: makes a batch of items.
        order: which images.
        size: images in a batch.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], order: list[int], size: int) -> None:
        self.dataset, self.collate, self.order, self.size = dataset, collate, order, size

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        chosen = self.order[number * self.size : (number + 1) * self.size]
        return self.collate([self.dataset[index] for index in chosen])


def calibration_batches(config: Config, images: int, seed: int = 0) -> list[Any]:
    """Load training images as the test pipeline prepares them: no augmentation, since the gates are to be typical.

    Raises:
        DataError: the config has no training set, or it is empty.
    """
    return list(training_images(config, images, seed))


def training_images(config: Config, images: int, seed: int = 0) -> ImageBatches:
    """Batches of `calibration_batches`, one at a time."""
    if not config.get('train_dataloader') or not config.get('test_dataloader'):
        raise DataError(f'{config.filename}: calibration needs a train_dataloader and a test_dataloader')
    test = config.test_dataloader
    dataset = unaugmented(config.train_dataloader.dataset, pipeline_of(test.dataset))
    loader = {**test, 'dataset': dataset, 'num_workers': 0, 'persistent_workers': False}
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        built = Runner.build_dataloader(loader)
    if not len(built.dataset):
        raise DataError(f'{config.filename}: the training set is empty')
    order = torch.randperm(len(built.dataset), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    return ImageBatches(built.dataset, built.collate_fn, order, test.get('batch_size', 1))


def pipeline_of(dataset: Any) -> Any:
    """Pipeline of a data set's config, inside of its wrappers."""
    while 'pipeline' not in dataset:
        inner = dataset.get('dataset') or (dataset.get('datasets') or [None])[0]
        if inner is None:
            raise DataError(f'a data set of type {dataset.get("type")} has no pipeline')
        dataset = inner
    return dataset['pipeline']


def unaugmented(dataset: Any, pipeline: Any) -> dict[str, Any]:
    """Config of the data sets inside, with another pipeline; wrappers that mix or repeat images are taken off."""
    if 'dataset' in dataset:
        return unaugmented(dataset['dataset'], pipeline)
    found = copy.deepcopy(dict(dataset))
    if 'datasets' in found:
        found['datasets'] = [unaugmented(inner, pipeline) for inner in found['datasets']]
        return found
    return {**found, 'pipeline': pipeline, 'test_mode': True}


def preprocessed_features(model: Any, batch: Any) -> Any:
    """Run a detector up to its neck: feature maps, which are continuous, unlike what follows NMS."""
    return model.extract_feat(model.data_preprocessor(batch, False)['inputs'])


def step_of(model: Any) -> Callable[[Any, Any], Any]:
    """How a detector is run to see its gates: up to its neck, and through dense heads that have some.

    It is the same for the folded model, which has none.
    """
    heads = gated_heads(model)

    def step(model: Any, batch: Any) -> Any:
        features = preprocessed_features(model, batch)
        return (features, *(getattr(model, name)(features) for name in heads)) if heads else features

    return step


def gated_heads(model: Any) -> list[str]:
    """Heads that run on feature maps alone, and have gates."""
    heads = {name: getattr(model, name, None) for name in ('rpn_head', 'bbox_head')}
    return [
        name
        for name, head in heads.items()
        if isinstance(head, BaseDenseHead) and any(isinstance(module, HasGates) for module in head.modules())
    ]


def check_reached(model: Any) -> None:
    """Refuse gates that depend on the input and lie behind the selection of boxes.

    Raises:
        FoldError: there are such gates.
    """
    seen = ('backbone.', 'neck.', *(f'{name}.' for name in gated_heads(model)))
    beyond = [row.path for row in describe(model).sites if not row.folds and not row.path.startswith(seen)]
    if beyond:
        raise FoldError(
            f'{some(beyond)}: gates that depend on the input, where boxes or queries are seen, which calibration does '
            f'not reach; plug dict(type="ASR", ...) there, which folds exactly, or choose other sites'
        )


def check_exact(model: nn.Module, checkpoint: Path, option: str) -> None:
    """Refuse to fold gates exactly that depend on the input.

    Args:
        model: a detector.
        checkpoint: where it comes from.
        option: of the command line that folds such gates.

    Raises:
        FoldError: there are such gates.
    """
    varying = [row for row in describe(model).sites if not row.folds]
    if varying:
        plugs = sorted({row.plug for row in varying})
        raise FoldError(
            f'{checkpoint}: the gates at {len(varying)} sites ({some(plugs)}) depend on the input and have no exact '
            f'fold; replace them by their mean over N training images with {option}, or train dict(type="ASR", ...)'
        )


def fold_over_images(
    config: Config, model: nn.Module, plan: CalibrationPlan, processes: Processes = ALONE
) -> tuple[nn.Module, FoldReport]:
    """Fold a detector by calibration on its own training images; the metric is AP on the test set of the config.

    All of ``processes`` call this: they share the measuring of AP, and each folds its own model.

    Raises:
        FoldError: see `asr_downstream.fold`.
        DataError: there are no data.
    """
    if plan.max_drop is not None and not plan.evaluate:
        raise DataError('max_drop is about AP, which has to be measured: leave evaluate=True')
    check_reached(model)
    model.to(get_device())
    batches = calibration_batches(config, plan.images, plan.seed)
    return fold_calibrated(
        model,
        batches,
        step=step_of(model),
        check=batches[:1],
        refine_norms=plan.refine_norms,
        metric=(lambda m: evaluate(config, m, 'AP', processes=processes).metrics['AP']) if plan.evaluate else None,
        max_drop=plan.max_drop,
    )
