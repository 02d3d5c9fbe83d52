"""MMDetection adapter: plugged backbones for configs, folding of checkpoints, evaluation, data.

Needs the extra ``det``; importing this package without it says how to install it.
"""

from asr_downstream.errors import AsrError

INSTALL = (
    "pip install -c constraints.txt torch ninja psutil 'setuptools<82' wheel && "
    'pip install -c constraints.txt --no-build-isolation --no-binary onedl-mmcv onedl-mmcv && '
    "pip install -c constraints.txt -e '.[det]'"
)

try:
    import mmdet  # noqa: F401
    from mmcv import ops as _ops  # noqa: F401
except ImportError as error:
    missing = 'mmcv was installed without its compiled ops' if 'mmcv._ext' in str(error) else str(error)
    raise AsrError(f'detection needs the extra det ({missing}); install it with: {INSTALL}') from error

from asr_downstream.detection import upstream  # noqa: E402, F401
