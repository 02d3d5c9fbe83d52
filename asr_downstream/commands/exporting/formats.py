"""Formats of exported models: how each is written, read, and run."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from asr_downstream.commands.exporting.subject import Axes, Subject
from asr_downstream.errors import AsrError, check_installed
from asr_downstream.files.atomic import first_line

__all__ = [
    'FORMATS',
    'LARGEST',
    'Exported',
    'Format',
    'calls_of',
    'check_extra',
    'facts_of',
    'open_session',
    'quiet',
    'trace',
    'write_onnx',
]

INSTALL = "pip install -c constraints.txt -e '.[export]'"
OPSET = 20
LARGEST = 63  # batch, and size in multiples, that is promised; diffusers has another way from a batch of 64 on


class Format(NamedTuple):
    """A format.

    Attributes:
        file: name of what is written.
        write: a traced program, with the names of its outputs.
        read: a file, to be run by so many threads: a function of the inputs by name that gives the outputs in order.
    """

    file: str
    write: Callable[[ExportedProgram, Path, Sequence[str]], Any]
    read: Callable[[Path, int], Callable[..., Sequence[Tensor]]]


class Exported(nn.Module):
    """A file as a model: called as the model that it was made from.

    Args:
        run: of a format.
        names: of the outputs.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], names: Sequence[str]) -> None:
        super().__init__()
        self.run, self.names = run, names
        self.train(False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.run(**inputs), strict=True))


def check_extra() -> None:
    """Refuse to go on without what writes and runs ONNX.

    Raises:
        AsrError: it is not installed.
    """
    check_installed(('onnx', 'onnxscript', 'onnxruntime'), 'ONNX needs the extra export', INSTALL)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say of other libraries and of themselves."""
    logger = logging.getLogger('torch.onnx')
    before = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            logger.setLevel(logging.ERROR)
            yield
    finally:
        logger.setLevel(before)


def trace(subject: Subject) -> tuple[ExportedProgram, Axes]:
    """Trace a model with as much left to vary as is possible.

    What may vary is tried: a program may have taken a number of the first call for granted.

    Returns:
        The program, and what may vary.

    Raises:
        AsrError: it cannot be traced.
    """
    reason: Exception | None = None
    for axes in (*subject.axes, {}):
        try:
            with quiet(), torch.no_grad():
                shapes = dims(axes, subject)
                program = torch.export.export(subject.model, (), subject.calls[0], dynamic_shapes=shapes, strict=False)
                run = program.module()
                for call in calls_of(subject, axes):
                    run(**call)
            return program, axes
        except Exception as error:  # tracing raises anything
            reason = reason or error
    said = '' if reason is None else first_line(reason)[:200]
    raise AsrError(f'{subject.name}: torch.export cannot trace it ({type(reason).__name__}: {said})') from reason


def calls_of(subject: Subject, axes: Axes) -> list[dict[str, Tensor]]:
    """Calls that differ from the first one only in what may vary."""

    def fits(name: str, value: Tensor) -> bool:
        first, free = subject.calls[0][name].shape, axes.get(name, {})
        return all(a == b or axis in free for axis, (a, b) in enumerate(zip(first, value.shape, strict=True)))

    return [call for call in subject.calls if all(fits(*item) for item in call.items())]


def dims(axes: Axes, subject: Subject) -> dict[str, Any]:
    """What may vary, as torch wants it said."""
    named: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name in subject.calls[0]:
        found[name] = {}
        for axis, (label, multiple) in axes.get(name, {}).items():
            dim = named.setdefault(label, Dim(label, min=1, max=LARGEST))
            found[name][axis] = dim if multiple == 1 else multiple * dim
    return found


def write_onnx(program: ExportedProgram, path: Path, names: Sequence[str]) -> None:
    """Write ONNX, by torch's newer exporter."""
    with quiet():
        found = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=list(names), verbose=False, optimize=True
        )
        assert found is not None
        found.save(path)


def open_session(path: Path, threads: int) -> Any:
    """Open an ONNX file on the CPU."""
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def read_onnx(path: Path, threads: int) -> Callable[..., Sequence[Tensor]]:
    """Open an ONNX file; inputs that it does not use are left out."""
    session = open_session(path, threads)
    wanted = {given.name for given in session.get_inputs()}

    def run(**inputs: Tensor) -> list[Tensor]:
        given = {key: value.detach().numpy() for key, value in inputs.items() if key in wanted}
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, given)]

    return run


def read_pt2(path: Path, threads: int) -> Callable[..., Sequence[Tensor]]:
    """Open a program of torch; its threads are torch's own."""
    program = torch.export.load(path).module()
    return lambda **inputs: list(program(**inputs).values())


FORMATS = {
    'onnx': Format('model.onnx', write_onnx, read_onnx),
    'pt2': Format('model.pt2', lambda program, path, names: torch.export.save(program, path), read_pt2),
}


def facts_of(path: Path) -> dict[str, Any]:
    """Opset and version of the format of an ONNX file."""
    model = importlib.import_module('onnx').load(path, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ('', 'ai.onnx'))
    return {'opset': opset, 'ir_version': model.ir_version}
