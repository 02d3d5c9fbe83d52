"""ONNX around the network: from an image as it is to pixels, and from candidates to boxes, scores and labels."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from asr_downstream.commands.exporting.formats import OPSET
from asr_downstream.commands.exporting.whole.decode import INPUTS, OUTPUTS
from asr_downstream.commands.exporting.whole.plan import Plan

__all__ = ['FOUND', 'Graph', 'pixels_graph', 'whole_graph']

FOUND = ('boxes', 'scores', 'labels')
UINT8, FLOAT, INT64, DOUBLE = 2, 1, 7, 11  # types of ONNX


class Graph:
    """Nodes and constants of ONNX, under names that nothing else has.

    Args:
        prefix: of the names.
    """

    def __init__(self, prefix: str) -> None:
        self.onnx: Any = importlib.import_module('onnx')
        self.prefix, self.nodes, self.constants = prefix, [], []  # type: ignore[var-annotated]

    def add(self, kind: str, *inputs: Any, name: str | None = None, **attributes: Any) -> str:
        """Add a node; inputs that are no names become constants. Returns the name of its output."""
        output = name or f'{self.prefix}_{len(self.nodes)}'
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(self.onnx.helper.make_node(kind, given, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Add a constant: an array, or whole numbers."""
        name = f'{self.prefix}_c{len(self.constants)}'
        array = value if isinstance(value, np.ndarray) else np.asarray(value, np.int64)
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name


def floats(*values: float) -> np.ndarray:
    """Array of float32."""
    return np.asarray(values, np.float32)


def pixels_of(graph: Graph, plan: Plan) -> None:
    """Add nodes that make `INPUTS` of ``image``, ``(height, width, 3)`` in red, green, blue, 8 bits.

    Sizes are found in float64, as MMDetection finds them. Values between pixels are rounded to 8 bits, as OpenCV does.
    """
    add = graph.add
    old = add('Cast', add('Slice', add('Shape', 'image'), [0], [2]), to=DOUBLE)
    if plan.keep_ratio:
        wide, narrow = (np.asarray([edge(plan.scale)], np.float64) for edge in (max, min))
        by_long = add('Div', wide, add('ReduceMax', old, keepdims=1))
        by_short = add('Div', narrow, add('ReduceMin', old, keepdims=1))
        scaled = add('Mul', old, add('Min', by_long, by_short))
        new = add('Floor', add('Add', scaled, np.asarray([0.5])))
    else:
        new = add('Identity', np.asarray(plan.scale[::-1], np.float64))
    whole = add('Cast', new, to=INT64)
    factor = add('Cast', add('Div', new, old), to=FLOAT)
    add('Gather', factor, [1, 0], name=INPUTS[2], axis=0)
    image = add('Unsqueeze', add('Transpose', add('Cast', 'image', to=FLOAT), perm=[2, 0, 1]), [0])
    if plan.reverse:
        image = add('Gather', image, [2, 1, 0], axis=1)
    sizes = add('Concat', [1, 3], whole, axis=0)
    image = add('Resize', image, '', '', sizes, mode='linear', coordinate_transformation_mode='half_pixel')
    image = add('Round', image)
    size = whole
    if plan.canvas is not None:
        size = graph.constant([plan.canvas[1], plan.canvas[0]])
        image = add_padding(graph, image, whole, size, plan.canvas_value)
    add('Cast', size, name=INPUTS[1], to=FLOAT)
    if plan.mean:
        image = add('Sub', image, floats(*plan.mean).reshape(1, 3, 1, 1))
        image = add('Div', image, floats(*plan.std).reshape(1, 3, 1, 1))
    part = add('Mul', add('Div', add('Add', size, [plan.divisor - 1]), [plan.divisor]), [plan.divisor])
    padded = add_padding(graph, image, size, part, plan.divisor_value)
    add('Identity', padded, name=INPUTS[0])


def add_padding(graph: Graph, image: str, size: str, wanted: str, value: float) -> str:
    """Add padding at the right and at the bottom."""
    missing = graph.add('Sub', wanted, size)
    return graph.add('Pad', image, graph.add('Concat', [0] * 6, missing, axis=0), floats(value).reshape(()))


def boxes_of(graph: Graph, plan: Plan) -> None:
    """Add nodes that choose `FOUND` among `OUTPUTS`, by NonMaxSuppression."""
    add = graph.add
    boxes, places, scores, labels = OUTPUTS
    limits = ([plan.most], floats(plan.overlap), floats(0.0))
    chosen = add('NonMaxSuppression', places, scores, *limits)
    index = add('Gather', chosen, np.asarray(2), axis=1)
    add('Gather', add('Squeeze', boxes, [0]), index, name=FOUND[0], axis=0)
    add('Gather', add('Squeeze', scores, [0, 1]), index, name=FOUND[1], axis=0)
    add('Gather', labels, index, name=FOUND[2], axis=0)


def image_input(graph: Graph) -> Any:
    """Description of the input."""
    return graph.onnx.helper.make_tensor_value_info('image', UINT8, ['height', 'width', 3])


def finish(graph: Graph, outputs: list[Any], opset: Any, ir_version: int) -> Any:
    """Make a model."""
    helper = graph.onnx.helper
    made = helper.make_graph(graph.nodes, 'detector', [image_input(graph)], outputs, graph.constants)
    return helper.make_model(made, opset_imports=opset, ir_version=ir_version)


def pixels_graph(plan: Plan) -> Any:
    """Model from an image to what the network is given."""
    graph = Graph('pre')
    pixels_of(graph, plan)
    shapes = ([1, 3, None, None], [2], [2])
    outputs = [
        graph.onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in zip(INPUTS, shapes, strict=True)
    ]
    return finish(graph, outputs, [graph.onnx.helper.make_opsetid('', OPSET)], 10)


def whole_graph(plan: Plan, network: Any, about: dict[str, str]) -> Any:
    """Model from an image to boxes.

    Args:
        plan: what surrounds the network.
        network: model from `INPUTS` to `OUTPUTS`.
        about: texts that the file holds, such as the names of the classes.
    """
    before, after = Graph('pre'), Graph('post')
    pixels_of(before, plan)
    boxes_of(after, plan)
    before.nodes += [*network.graph.node, *after.nodes]
    before.constants += [*network.graph.initializer, *after.constants]
    describe = before.onnx.helper.make_tensor_value_info
    outputs = [describe('boxes', FLOAT, ['found', 4]), describe('scores', FLOAT, ['found']),
               describe('labels', INT64, ['found'])]  # fmt: skip
    model = finish(before, outputs, network.opset_import, network.ir_version)
    model.functions.extend(network.functions)
    before.onnx.helper.set_model_props(model, about)
    before.onnx.checker.check_model(model)
    return model
