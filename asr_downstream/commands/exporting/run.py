"""Exporting: traced once, written in each format, compared with torch, and only then given its name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from asr_downstream.commands.exporting.formats import FORMATS, Exported, calls_of, check_extra, facts_of, trace
from asr_downstream.commands.exporting.infer import program as program_text
from asr_downstream.commands.exporting.quantise import quantise
from asr_downstream.commands.exporting.receipt import PARITY, RECEIPT, Entry, Receipt
from asr_downstream.commands.exporting.subject import Axes, Subject
from asr_downstream.commands.exporting.whole.plan import NotWhole
from asr_downstream.console.text import some
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import check_could_write, files_in, not_ours, sha256, whole_folder, write_json
from asr_downstream.folding.verify import Difference, verify
from asr_downstream.measure.timing import paired_times, ratio

__all__ = ['check_out', 'export']

ROUNDS = 15
INT8 = 'model.int8.onnx'


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, or that holds something else; before the work.

    Raises:
        AsrError: see above.
    """
    if strange := not_ours(out, RECEIPT):
        raise AsrError(f'{out}: holds {some(strange, 3)}, which this tool has not written; give another name')
    check_could_write(out.absolute().parent)


def export(subject: Subject, formats: Sequence[str], out: Path, threads: int = 1, int8: bool = False) -> Receipt:
    """Write a model in each format to a folder, with a receipt, whole or not at all.

    Args:
        subject: the model.
        formats: of `FORMATS`.
        out: folder; one that this function has written before is replaced.
        threads: of the times.
        int8: also write ONNX of 8 bits, which is measured and may differ.

    Raises:
        AsrError: it cannot be traced or written, or a file does not compute what the model does: then nothing is left.
    """
    check_out(out)
    if 'onnx' in formats:
        check_extra()
    program, axes = trace(subject)
    names, calls = subject.names(), calls_of(subject, axes)
    size = sum(value.nbytes for value in subject.model.state_dict().values()) * len(formats)
    with whole_folder(out, size) as aside:
        models: dict[str, torch.nn.Module] = {'torch': subject.model}
        entries = [Entry('torch')]
        for name in formats:
            path = aside / FORMATS[name].file
            FORMATS[name].write(program, path, names)
            if name == 'onnx' and subject.infer is not None:
                describe(path, subject.infer[1])
            models[path.name] = Exported(FORMATS[name].read(path, threads), names)
            entries.append(compared(subject, path, models[path.name], calls))
        if int8 and 'onnx' in formats:
            path = aside / INT8
            quantise(aside / FORMATS['onnx'].file, path, as_arrays(calls))
            models[path.name] = Exported(FORMATS['onnx'].read(path, threads), names)
            entries.append(compared(subject, path, models[path.name], calls, refused=False))
        measure(subject, models, entries, min(calls, key=images_in), threads)
        infer = None if subject.infer is None else subject.infer[0]
        about = dict(subject.about)
        if subject.whole is not None and 'onnx' in formats:
            try:
                entries += subject.whole.write(aside, threads, int8)
                infer = 'detect'
            except NotWhole as error:
                about['whole'] = f'no: {error}'
        if infer is not None and 'onnx' in formats:
            (aside / 'infer.py').write_text(program_text(infer), encoding='utf-8')
        receipt = Receipt(
            model=subject.name,
            kind=subject.kind,
            data=subject.data,
            entries=entries,
            varies=said(axes),
            sources={path.name: sha256(path) for path in subject.sources},
            threads=threads,
            about=about,
        )
        receipt.files = sorted([*files_in(aside), RECEIPT])
        write_json(aside / RECEIPT, receipt.as_dict())
    return receipt


def compared(subject: Subject, path: Path, model: torch.nn.Module, calls: list[Any], refused: bool = True) -> Entry:
    """Compare a file with the model, call by call.

    Raises:
        AsrError: they differ, which is ``refused``.
    """
    found = verify(model, subject.model, calls)
    worst = max(found.outputs, key=lambda output: output.relative)
    if refused and not found.relative <= PARITY:
        raise AsrError(
            f'{path.name}: its output {name_of(worst)} differs from that of torch by {worst.relative:.1e} of its size, '
            f'more than {PARITY:g}; nothing was written'
        )
    parity = {name_of(each): {'relative': each.relative, 'absolute': each.absolute} for each in found.outputs}
    facts: dict[str, Any] = {'parity': parity}
    if path.suffix == '.onnx':
        facts |= facts_of(path)
    return Entry(path.name, found.relative, path.stat().st_size, sha256(path), facts=facts)


def as_arrays(calls: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """Calls as onnxruntime takes them."""
    for call in calls:
        yield {name: value.numpy() for name, value in call.items()}


def describe(path: Path, facts: dict[str, Any]) -> None:
    """Write what a program beside an ONNX file has to know into the file."""
    onnx = importlib.import_module('onnx')
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {'schedule': json.dumps(facts)})
    onnx.save(model, path)


def name_of(found: Difference) -> str:
    """Name of an output, as the file has it."""
    return found.output.removeprefix('output.')


def images_in(call: dict[str, torch.Tensor]) -> int:
    """Size of the batch of a call."""
    return len(next(iter(call.values())))


def measure(
    subject: Subject,
    models: dict[str, torch.nn.Module],
    entries: list[Entry],
    call: dict[str, torch.Tensor],
    threads: int,
) -> None:
    """Time the models on one call, in turns, and score them on the data."""
    with torch.no_grad():
        times = paired_times({n: partial(m, **call) for n, m in models.items()}, ROUNDS, 'latency', threads=threads)
    for entry in entries:
        entry.latency_ms = round(median(times[entry.name]), 4)
        entry.ratio = round(ratio(times[entry.name], times['torch']).median, 4)
        if subject.score is not None:
            entry.metrics = subject.score(models[entry.name], entry.name)


def said(axes: Axes) -> dict[str, dict[str, str]]:
    """What may vary, for people: ``{'image': {'0': 'batch', '2': 'multiples of 32'}}``."""
    return {
        name: {str(axis): label if multiple == 1 else f'{label}, a multiple of {multiple}'
               for axis, (label, multiple) in given.items()}
        for name, given in axes.items()
    }  # fmt: skip
