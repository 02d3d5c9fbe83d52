"""Ready configs, found by name: those of the checkout, or in an installed wheel the copies that it holds."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from asr_downstream.errors import AsrError

__all__ = ['FOLDERS', 'ROOT', 'find_config', 'line_of', 'ready_configs']

PACKAGE = Path(__file__).resolve().parent.parent
# Folder that holds `FOLDERS`: the checkout, or what setup.py has put into the wheel.
ROOT = PACKAGE / '_configs' if (PACKAGE / '_configs').is_dir() else PACKAGE.parent
FOLDERS = ('det_configs', 'diffusion/configs', 'tools/cls_configs', 'tools/far_configs')
COMMAND = re.compile(r'(python|accelerate|asr-downstream) ')


def ready_configs(folder: str) -> list[Path]:
    """Ready configs of one of `FOLDERS`, without those that are only inherited from (``_base_``)."""
    return sorted(path for path in (ROOT / folder).rglob('*.py') if '_base_' not in path.parts)


def find_config(given: Path, folder: str) -> Path:
    """Return the file that is meant: ``given`` itself, if it is one, or the ready config of that name.

        find_config(Path('unet-w32_digits'), 'diffusion/configs')    # ... or unet-w32_digits.py
        find_config(Path('digits/retinanet_r18-w16_fpn_digits.py'), 'det_configs')

    Args:
        given: path, or the end of the path of a ready config, with or without ``.py``.
        folder: one of `FOLDERS`.

    Raises:
        AsrError: there is no such config, or several have that name.
    """
    if given.is_file():
        return given
    ready = ready_configs(folder)
    wanted = parts_of(given)
    found = [path for path in ready if parts_of(path.relative_to(ROOT))[-len(wanted) :] == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        names = ', '.join(path.relative_to(ROOT).as_posix() for path in found)
        raise AsrError(f'{given}: is the name of several ready configs, {names}; give more of the path')
    close = difflib.get_close_matches(wanted[-1] if wanted else '', {path.stem for path in ready}, cutoff=0.5)
    hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
    raise AsrError(
        f'{given}: no such config; {hint}ready ones are in {folder}/, and "asr-downstream configs" lists their names'
    )


def parts_of(path: Path) -> tuple[str, ...]:
    """Parts of a path without ``.py`` at its end."""
    return (path.with_suffix('') if path.suffix == '.py' else path).parts


def line_of(path: Path) -> str:
    """Return the first sentence of the comment at the top of a config, or what the config inherits."""
    words: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith('#'):
            break
        text = line.removeprefix('#')
        if not COMMAND.match(text.strip()):
            words += text.split()
    sentence = re.split(r'(?<=\w)\.(?= |$)', ' '.join(words), maxsplit=1)[0]
    base = re.search(r"^_base_ = \[?'(?:(mmdet)::|(?:\.{1,2}/)*)(.+?)'", path.read_text(), re.MULTILINE)
    return sentence or (f'inherits {base[2]}{" of MMDetection" if base[1] else ""}' if base else '')
