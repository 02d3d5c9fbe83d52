"""diffusers adapter: training under accelerate, sampling, evaluation, folding into a stock pipeline.

Needs the extra ``diffusion``; importing this package without it says how to install it.
"""

from asr_downstream.errors import AsrError

INSTALL = "pip install -c constraints.txt -e '.[diffusion]'"

try:
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
except ImportError as error:
    raise AsrError(f'generation needs the extra diffusion ({error}); install it with: {INSTALL}') from error
