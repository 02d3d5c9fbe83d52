"""The build step that puts the ready configs of the checkout into the wheel; all else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = (
    'det_configs',
    'diffusion/configs',
    'tools/cls_configs',
    'tools/far_configs',
)  # asr_downstream.files.ready.FOLDERS


class BuildWithConfigs(build_py):
    """Copies the configs to ``asr_downstream/_configs``, where `asr_downstream.files.ready` finds them.

    An editable installation has those of the checkout.
    """

    def run(self) -> None:
        """Build the package, and copy."""
        super().run()
        if self.editable_mode:
            return
        out = Path(self.build_lib) / 'asr_downstream' / '_configs'
        shutil.rmtree(out, ignore_errors=True)  # of an earlier build
        for folder in FOLDERS:
            for config in (ROOT / folder).rglob('*.py'):
                copy = out / config.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(config, copy)


setup(cmdclass={'build_py': BuildWithConfigs})
