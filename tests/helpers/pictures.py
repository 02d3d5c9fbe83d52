"""Fixtures of the tests of detectors: pictures with boxes, and a stock checkpoint trained on them."""

from pathlib import Path

import pytest


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of a few small pictures."""
    from helpers.tiny_detection import pictures  # needs MMDetection

    return pictures(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def stock(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of the stock detector after some steps on them."""
    from helpers.learning_detection import stock_checkpoint

    return stock_checkpoint(digits, tmp_path_factory.mktemp('stock'))
