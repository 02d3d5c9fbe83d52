"""MMDetection adapter: plugged backbones for configs, folding of checkpoints, evaluation, data.

Needs the extra ``det``; importing this package without it says how to install it. MMDetection itself is imported by
`asr_downstream.detection.extra`, with the first room that uses it.
"""

from asr_downstream.errors import check_installed

INSTALL = (
    "pip install -c constraints.txt torch ninja psutil 'setuptools<82' wheel && "
    'pip install -c constraints.txt --no-build-isolation --no-binary onedl-mmcv onedl-mmcv && '
    "pip install -c constraints.txt -e '.[det]'"
)

check_installed(('mmdet', 'mmcv'), 'detection needs the extra det', INSTALL)
