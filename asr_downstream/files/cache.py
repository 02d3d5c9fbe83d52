"""Where results that can be made again are kept between runs: compiled code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ['cache_folder']


def cache_folder() -> Path:
    """Return ``$ASR_CACHE``, or ``~/.cache/asr-downstream``; it may not be there yet."""
    given = os.environ.get('ASR_CACHE')
    return Path(given).expanduser().absolute() if given else Path.home() / '.cache' / 'asr-downstream'
