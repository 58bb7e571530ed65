"""An ONNX model in any of its forms, as what a session can load, and with its inner values laid open."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import onnx_ir

OnnxSource: TypeAlias = "str | Path | bytes | onnx_ir.Model"

# protobuf cannot serialise 2 GiB, and what is not tensors needs some room, too.
INLINE_BYTES = 2**31 - 2**26

_COARSE_FIRST = {"BFLOAT16": "bfloat16", "FLOAT16": "float16", "FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Exposed:
    """A copy of a model whose inner values are outputs.

    Attributes:
        model: the copy; it shares its tensors with the original.
        parents: inner value to what its node reads (subgraphs included), in topological order.
        outputs: the outputs that the model had before.
    """

    model: onnx_ir.Model
    parents: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


def read(source: OnnxSource) -> onnx_ir.Model:
    """The model as IR; a path is read lazily, weights beside it stay there until they are needed."""
    import onnx
    import onnx_ir

    if isinstance(source, (str, Path)):
        return onnx_ir.load(source)
    if isinstance(source, bytes):
        return onnx_ir.from_proto(onnx.load_from_string(source))
    return source


@contextmanager
def loadable(source: OnnxSource) -> Iterator[str | bytes]:
    """What ``onnxruntime.InferenceSession`` takes; valid inside the context only.

    IR models of 2 GiB and more, and those with weights in other files, go through a temporary folder.
    """
    import onnx_ir

    if isinstance(source, (str, Path)):
        yield str(source)
    elif isinstance(source, bytes):
        yield source
    elif _fits_inline(source):
        yield onnx_ir.to_proto(source).SerializeToString()
    else:
        with tempfile.TemporaryDirectory(prefix="bnctl-") as folder:
            path = Path(folder, "model.onnx")
            onnx_ir.save(source, path, external_data="model.data")
            yield str(path)


def expose(source: OnnxSource, names: Collection[str] | None = None) -> Exposed:
    """Make values that nodes of the main graph compute outputs of a copy of the model: those that are named, or all."""

    model = read(source).clone()
    graph = model.graph
    outputs = tuple(str(value.name) for value in graph.outputs)
    parents: dict[str, tuple[str, ...]] = {}
    for node in graph:
        reads = tuple(dict.fromkeys(_reads(node)))
        for value in node.outputs:
            if value.name:
                parents[value.name] = reads
    for value in [value for node in graph for value in node.outputs]:
        if value.name and value.name not in outputs and (names is None or value.name in names):
            graph.outputs.append(value)
    return Exposed(model, parents, outputs)


def precision(source: OnnxSource) -> str:
    """The coarsest float type among a model's weights, read from their headers; "float32" if there are none."""
    import onnx_ir

    model = read(source)
    types = {
        tensor.dtype.name
        for graph in model.graphs()
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
    } | {
        attribute.as_tensor().dtype.name
        for graph in model.graphs()
        for node in graph
        for attribute in node.attributes.values()
        if attribute.type == onnx_ir.AttributeType.TENSOR
    }
    return next((name for onnx_name, name in _COARSE_FIRST.items() if onnx_name in types), "float32")


def _reads(node: onnx_ir.Node) -> Iterator[str]:
    """Names that a node reads, with those in its subgraphs (names of the subgraph itself among them do no harm)."""
    import onnx_ir

    yield from (value.name for value in node.inputs if value is not None and value.name)
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            yield from (value.name for value in graph.outputs if value.name)
            for inner in graph:
                yield from _reads(inner)


def _fits_inline(model: onnx_ir.Model) -> bool:
    import onnx_ir

    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return total < INLINE_BYTES and not any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in tensors)
