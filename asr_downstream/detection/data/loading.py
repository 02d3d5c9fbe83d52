"""Loading of images that says which file it was about: OpenCV and Pillow are given bytes, and name none."""

from __future__ import annotations

from mmcv.transforms import LoadImageFromFile as StockLoadImageFromFile
from mmengine.config import Config

from asr_downstream.detection.data.coco import leaves
from asr_downstream.detection.types import kind_of
from asr_downstream.errors import DataError
from asr_downstream.registry import TRANSFORMS

__all__ = ['LoadImageFromFile', 'name_files']


@TRANSFORMS.register_module()
class LoadImageFromFile(StockLoadImageFromFile):
    """MMCV's transform of this name, so that a shipped config, where ``asr_downstream.`` is taken off, has that."""

    stock_class = StockLoadImageFromFile

    def transform(self, results: dict) -> dict | None:
        """Load an image.

        Raises:
            DataError: it cannot be read; with its file.
        """
        try:
            return super().transform(results)
        except MemoryError:
            raise
        except Exception as error:  # cv2.error, UnidentifiedImageError, OSError, AssertionError, ...
            reason = ' '.join(str(error).split())[:200]
            raise DataError(
                f'{results["img_path"]}: cannot be read as an image ({type(error).__name__}: {reason}); replace it or '
                f'take it out of the annotation file'
            ) from error


def name_files(config: Config) -> None:
    """Let the data sets of a config load their images with `LoadImageFromFile`, in place."""
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if not (config.get(loader) or {}).get('dataset'):
            continue
        for dataset in leaves(config[loader].dataset):
            for step in dataset.get('pipeline') or ():
                if isinstance(step, dict) and kind_of(step.get('type')) == 'LoadImageFromFile':
                    step['type'] = 'asr_downstream.LoadImageFromFile'
