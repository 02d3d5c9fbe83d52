"""The training engine: one loop under accelerate, with checkpoints, averages, resume and logs, for any
`asr_downstream.engine.task.Task`.

Needs the extra ``diffusion`` or ``far``; importing this package without it says how to install it.
"""

from asr_downstream.errors import AsrError

INSTALL = "pip install -c constraints.txt -e '.[far]', or with '.[diffusion]'"

try:
    import accelerate  # noqa: F401
    import pydantic  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise AsrError(f'training needs the extra far or diffusion ({error}); install it with: {INSTALL}') from error
