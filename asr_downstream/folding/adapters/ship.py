"""Adapters in checkpoints and folders on the disk: strict stock weights, in the layout that the base has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import (
    aside,
    check_could_write,
    files_in,
    not_ours,
    sha256,
    whole_folder,
    write_json,
    write_together,
)
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.adapters.apply import Given, apply_to_state, check_base
from asr_downstream.folding.adapters.folders import Part, find_part
from asr_downstream.folding.adapters.layers import member
from asr_downstream.measure.versions import versions

__all__ = ['REPORT', 'applied_state', 'apply_to_file', 'apply_to_folder', 'report_of']

REPORT = 'fold_report.json'
FORMATS = ('.pth', '.pt', '.safetensors')
META = ('dataset_meta', 'epoch', 'iter', 'seed')  # what a checkpoint of MMEngine says that is still true
OF_BASE = (REPORT, 'README.md', 'samples.png')  # of a folder: what is said and shown of the base


def apply_to_file(
    base: Path,
    adapters: Sequence[Given],
    out: Path,
    force: bool = False,
    trust: bool = False,
    more: Callable[[dict[str, Tensor]], Mapping[Path, Callable[[Path], Any]]] | None = None,
) -> dict[str, Any]:
    """Apply adapters to a file of weights, and write another one, with a report beside it.

    Args:
        base: ``.pth`` as MMEngine writes it or a plain state dict, or ``.safetensors``.
        adapters: see `asr_downstream.folding.adapters.apply.given`.
        out: file to write, ``.pth`` or ``.safetensors``; the report is ``<out>.json``.
        force: see `asr_downstream.apply_gates`.
        trust: see `asr_downstream.files.weights.read_checkpoint`.
        more: given the new weights, returns further files to write with them: path -> what writes it.

    Returns:
        The report.

    Raises:
        CheckpointError: base or adapters cannot be read, or do not belong together.
        AsrError: ``out`` cannot be written.
    """
    if out.suffix not in FORMATS:
        raise AsrError(f'{out}: should end in {", ".join(FORMATS)}')
    sources = [base, *(one.adapter.path for one in adapters if one.adapter.path is not None)]
    report_path = out.with_suffix('.json')
    for path in (out, report_path):
        if any(path.resolve() == source.resolve() for source in sources):
            raise AsrError(f'{path}: would overwrite {path.name}, which is read; give another name')
    check_could_write(out.parent)
    checkpoint = read_checkpoint(base, trust)
    state = applied_state(state_dict_of(checkpoint, base), adapters, str(base), force)
    meta = meta_of(checkpoint, adapters)
    content = report_of({base.name: sha256(base)}, adapters)

    def write(path: Path) -> None:
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        if out.suffix == '.safetensors':
            save_file(own, path, {'format': 'pt'})
        else:
            torch.save(own if meta is None else {'state_dict': own, 'meta': meta}, path)

    def write_report(path: Path) -> None:
        content['weights'] = {out.name: sha256(aside(out))}
        write_json(path, content)

    write_together({out: write, **(more(state) if more else {}), report_path: write_report})
    return content


def apply_to_folder(base: Path, adapters: Sequence[Given], out: Path, force: bool = False) -> dict[str, Any]:
    """Apply adapters to a model or pipeline of diffusers or transformers, and write another folder of the same kind.

    Everything else in the folder is copied, but what is said of the base, and its weights in other formats.

    Args:
        base: folder, with weights in safetensors.
        adapters: all of one model of the pipeline.
        out: folder to write; one that was written here before is replaced.
        force: see `asr_downstream.apply_gates`.

    Returns:
        The report, which is ``fold_report.json`` in the folder.

    Raises:
        CheckpointError: base or adapters cannot be read, or do not belong together.
        AsrError: ``out`` cannot be written, or holds something else.
    """
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise AsrError(f'{out}: is the base, or in it; give another folder')
    if strange := not_ours(out, REPORT):
        raise AsrError(f'{out}: holds {some(strange, 3)}, which this tool has not written; give another name')
    part = find_part(base, (member(at, 'weight') for one in adapters for at in one.adapter.sites))
    before = part.state()
    state = applied_state(before, adapters, str(part.folder), force)
    for name, value in before.items():
        if state[name].shape != value.shape:
            raise CheckpointError(
                f'{name}: is of shape {tuple(value.shape)} in {part.folder}, as its config says, and a head is of '
                f'shape {tuple(state[name].shape)}; apply it in Python, to a model with that head, or leave it out'
            )
    left = {*part.stale, *(base / name for name in OF_BASE)}
    with whole_folder(out, sum(value.nbytes for value in state.values())) as building:
        shutil.copytree(base, building, ignore=lambda at, names: ignored(Path(at), names, left), dirs_exist_ok=True)
        target = building / part.folder.relative_to(base)
        part.write(state, target)
        check_written(Part(target, {target / path.name: names for path, names in part.shards.items()}), state)
        hashes = {path.relative_to(base).as_posix(): sha256(path) for path in part.shards}
        content = report_of(hashes, adapters)
        content['weights'] = {name: sha256(building / name) for name in hashes}
        content['files'] = sorted([*files_in(building), REPORT])
        write_json(building / REPORT, content)
    return content


def ignored(at: Path, names: list[str], left: set[Path]) -> list[str]:
    """What is not copied of a folder."""
    return [name for name in names if at / name in left or name in ('.git', '.cache')]


def check_written(part: Part, state: Mapping[str, Tensor]) -> None:
    """Read weights back, and compare every bit."""
    again = part.state()
    if again.keys() != state.keys() or not all(torch.equal(again[name], state[name]) for name in state):
        raise AsrError(f'{part.folder}: what was written does not read back as it was; check the disk')


def applied_state(
    state: Mapping[str, Tensor], adapters: Sequence[Given], what: str, force: bool = False
) -> dict[str, Tensor]:
    """Check that adapters are for these weights, and apply them.

    Raises:
        CheckpointError: they are not.
    """
    for one in adapters:
        check_base(one.adapter, state, what, force)
    return apply_to_state(state, adapters)


def meta_of(checkpoint: Mapping[str, Any], adapters: Sequence[Given]) -> dict[str, Any] | None:
    """What the new checkpoint says besides weights; None: the base is a plain state dict.

    The names of the classes are those of an adapter that brings heads for others.
    """
    if 'state_dict' not in checkpoint and 'meta' not in checkpoint:
        return None
    given = checkpoint.get('meta')
    found = {key: given[key] for key in META if key in given} if isinstance(given, Mapping) else {}
    for one in adapters:
        classes = one.adapter.about.get('classes')
        if classes and one.heads and one.strength and one.adapter.heads:
            found['dataset_meta'] = {'classes': tuple(map(str, classes))}
    return found


def report_of(base: Mapping[str, str], adapters: Sequence[Given]) -> dict[str, Any]:
    """What a reader of the report wants to know.

    Args:
        base: files of the base -> their hashes.
        adapters: as they were applied.
    """
    return {
        'base': dict(base),
        'adapters': [
            {
                'file': one.adapter.name,
                'sha256': None if one.adapter.path is None else sha256(one.adapter.path),
                'strength': one.strength,
                'heads': sorted(one.adapter.heads) if one.heads and one.strength else [],
                'sites': list(one.adapter.sites),
                'spec': one.adapter.spec,
                'base': one.adapter.base.digest,
            }
            for one in adapters
        ],
        'versions': versions(),
    }
