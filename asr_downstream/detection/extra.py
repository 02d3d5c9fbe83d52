"""Imports MMDetection, once and quietly, and mends it; every room of this package imports this module first."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from asr_downstream.detection import INSTALL
from asr_downstream.errors import AsrError


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


@contextmanager
def without_onedl() -> Iterator[None]:
    """Leave out "Could not import OneDL", which MMDetection logs at level DEBUG and to no logger, so it is printed."""
    with redirect_stdout(Filtered()):
        yield


try:
    with without_onedl():
        import mmdet.datasets  # noqa: F401
    from mmcv import ops as _ops  # noqa: F401
except ImportError as error:
    missing = 'mmcv was installed without its compiled ops' if 'mmcv._ext' in str(error) else str(error)
    raise AsrError(f'detection needs the extra det ({missing}); install it with: {INSTALL}') from error
