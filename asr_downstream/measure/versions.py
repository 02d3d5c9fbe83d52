"""Provenance: the versions and the machine behind a number."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

__all__ = ['versions']

PACKAGES = (
    'asr-downstream', 'torch', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'mmengine', 'mmcv', 'mmdet',
    'diffusers', 'accelerate', 'torchmetrics',
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter, and the kind of machine."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found['machine'] = f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs'
    if torch.cuda.is_available():
        found['accelerator'] = torch.cuda.get_device_name()
    return found
