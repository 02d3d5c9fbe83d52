"""Files of 8 bits: static quantisation by onnxruntime, a scale for each channel of the weights."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asr_downstream.commands.exporting.formats import quiet

__all__ = ['KINDS', 'quantise']

KINDS = ('Conv', 'ConvTranspose', 'MatMul', 'Gemm')  # nodes of ONNX that compute with 8 bits


def quantise(path: Path, out: Path, calls: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write a file whose convolutions and matrix products have inputs and weights of 8 bits.

    Args:
        path: ONNX.
        out: file to write.
        calls: inputs by name, which the ranges of the activations are taken from.
    """
    quantization = importlib.import_module('onnxruntime.quantization')

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.calls: Iterator[Any] = iter(calls)

        def get_next(self) -> Any:
            return next(self.calls, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        ready = Path(folder) / 'ready.onnx'
        quantization.shape_inference.quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(ready),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            op_types_to_quantize=list(KINDS),
        )
