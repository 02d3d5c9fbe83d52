"""Import this first, and ``import asr_downstream`` fails: the proof that shipped models do not need it."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class Refuse(MetaPathFinder):
    """Import hook that raises for this package and leaves everything else to the next finder."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Raise for this package."""
        if fullname.partition('.')[0] == 'asr_downstream':
            raise ImportError(f'{fullname} must not be imported here')


sys.meta_path.insert(0, Refuse())
