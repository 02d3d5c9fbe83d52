"""diffusers adapter: training under accelerate, sampling, evaluation, folding into a stock pipeline.

Needs the extra ``diffusion``; importing this package without it says how to install it.
"""

from asr_downstream.errors import check_installed

INSTALL = "pip install -c constraints.txt -e '.[diffusion]'"

check_installed(('accelerate', 'diffusers'), 'generation needs the extra diffusion', INSTALL)
