"""Hides MMDetection from the processes that tests start: Python imports this file by itself from its path."""

import sys

for _name in ('mmcv', 'mmdet'):
    sys.modules[_name] = None  # type: ignore[assignment]  # what import takes for a package that is not there
