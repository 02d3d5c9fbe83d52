"""Programs that go beside exported files: they need onnxruntime, numpy and pillow, and nothing of this package."""

from __future__ import annotations

from pathlib import Path

__all__ = ['program']


def program(name: str) -> str:
    """Text of a program."""
    return (Path(__file__).parent / f'{name}.py').read_text(encoding='utf-8')
