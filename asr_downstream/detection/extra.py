"""MMDetection, imported when it is used: quiet, mended, and with one line where it is not installed whole.

What is mended would stop MMDetection's own models here; each mend says where the fault is reported.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from asr_downstream.errors import AsrError, check_installed

__all__ = ['check', 'load']

INSTALL = (
    "pip install -c constraints.txt torch ninja psutil 'setuptools<82' wheel && "
    'pip install -c constraints.txt --no-build-isolation --no-binary onedl-mmcv onedl-mmcv && '
    "pip install -c constraints.txt -e '.[det]'"
)
NEEDS = 'detection needs the extra det'


class Filtered(io.TextIOBase):
    """Standard output without what MMDetection prints at import for want of a package that none of its users has."""

    def __init__(self) -> None:
        self.out = sys.stdout
        self.skipped = False

    def write(self, text: str) -> int:
        """Pass a text on; the newline of a line that was left out comes by itself."""
        if not text.startswith('Could not import OneDL') and not (self.skipped and text == '\n'):
            self.out.write(text)
        self.skipped = text.startswith('Could not import OneDL')
        return len(text)

    def flush(self) -> None:
        """Flush."""
        self.out.flush()


def quietly(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Leave out "Could not import OneDL", which MMDetection logs at level DEBUG and to no logger, so it is printed."""
    with redirect_stdout(Filtered()):
        run(module)


def with_loss(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Give SSDHead a ``loss_cls``; None is what the code behind it needs: "no custom activation".

    Since 3.2, inference reads `self.loss_cls` of every dense head, and SSDHead has none (open-mmlab/mmdetection#11780).
    """
    run(module)
    if not hasattr(module.SSDHead, 'loss_cls'):
        module.SSDHead.loss_cls = None


# Module of MMDetection -> how it is run; called with what runs it, and the module.
RUN_BY = {'mmdet.datasets': quietly, 'mmdet.models.dense_heads.ssd_head': with_loss}


class Finder(MetaPathFinder):
    """Finds the modules of `RUN_BY`, whoever imports them, and lets them be run as it says."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module of `RUN_BY`; others are left to the next finder."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in RUN_BY else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: RUN_BY[fullname](run, module)  # type: ignore[method-assign]
        return spec


def check() -> None:
    """Refuse to go on without MMDetection, and be there when it is imported.

    Raises:
        AsrError: it or MMCV is not installed.
    """
    check_installed(('mmdet', 'mmcv'), NEEDS, INSTALL)
    sys.meta_path.insert(0, Finder())
    head = sys.modules.get('mmdet.models.dense_heads.ssd_head')
    if head is not None:  # was imported before this package
        with_loss(lambda module: None, head)


def load() -> None:
    """Import MMDetection; every room of this package does so first.

    Raises:
        AsrError: MMCV has no compiled ops, or something cannot be imported.
    """
    try:
        import mmdet.datasets  # noqa: F401
        from mmcv import ops  # noqa: F401
    except ImportError as error:
        missing = 'mmcv was installed without its compiled ops' if 'mmcv._ext' in str(error) else str(error)
        raise AsrError(f'{NEEDS} ({missing}); install it with: {INSTALL}') from error
