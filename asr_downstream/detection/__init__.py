"""MMDetection adapter: plugged backbones for configs, folding of checkpoints, evaluation, data.

Needs the extra ``det``; importing this package without it says how to install it. MMDetection itself is imported with
the first room that uses it.
"""

from asr_downstream.detection.extra import check

check()
