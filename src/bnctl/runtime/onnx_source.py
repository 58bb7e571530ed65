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

_LARGE_BYTES = 2**16
_ELSEWHERE = "weights"
_SHARED_TYPES = frozenset({"FLOAT", "DOUBLE"})
"""Types that are weights and nothing else: shape inference reads integers, and the runtime converts half precision."""

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
def loadable(
    source: OnnxSource, *, shared: bool, exposed: Collection[str] = ()
) -> Iterator[tuple[str | bytes, dict[str, onnx_ir.TensorProtocol]]]:
    """What ``onnxruntime.InferenceSession`` takes, valid inside the context only, and the initializers that the caller adds to it.

    Models of 2 GiB and more, and those with weights in other files, go through a temporary folder.

    Args:
        source: the model.
        shared: leave the large weights of an IR model where they are, in memory or in the file that they are mapped from, instead of handing the session
            a copy. An optimiser could not read them.
        exposed: values that nodes of the main graph compute, to be outputs, too.
    """
    import onnx_ir

    if exposed:
        source = read(source)
    if isinstance(source, (str, Path)):
        yield str(source), {}
    elif isinstance(source, bytes):
        yield source, {}
    else:
        rest, weights = _without_large_weights(source) if shared else (source, {})
        if not weights and _fits_inline(source):
            yield _serialised(source, exposed), {}
            return
        with tempfile.TemporaryDirectory(prefix="bnctl-") as folder:
            path = Path(folder, "model.onnx")
            if _fits_inline(rest, weights):
                Path(folder, _ELSEWHERE).touch()  # the runtime sees that it exists, and does not read it
                path.write_bytes(_serialised(rest, exposed))
            else:
                weights = {}
                onnx_ir.save(expose(source, exposed).model if exposed else source, path, external_data="model.data")
            yield str(path), weights


def _serialised(model: onnx_ir.Model, exposed: Collection[str]) -> bytes:
    import onnx
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    given = {output.name for output in proto.graph.output}
    computed = (name for node in proto.graph.node for name in node.output)
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in computed if name in exposed and name not in given
    )
    return bytes(proto.SerializeToString())


def _without_large_weights(
    model: onnx_ir.Model,
) -> tuple[onnx_ir.Model, dict[str, onnx_ir.TensorProtocol]]:
    """A copy whose large weights are said to be in another file, and these by name."""
    import onnx_ir

    clone = model.clone()
    weights: dict[str, onnx_ir.TensorProtocol] = {}
    for name, value in clone.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype.name not in _SHARED_TYPES or value.is_graph_input():
            continue  # an optional input keeps its default
        if tensor.nbytes > _LARGE_BYTES or isinstance(tensor, onnx_ir.ExternalTensor):
            weights[name] = tensor
            value.const_value = onnx_ir.ExternalTensor(
                _ELSEWHERE, 0, tensor.nbytes, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name
            )
    return clone, weights


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


def _fits_inline(model: onnx_ir.Model, elsewhere: Collection[str] = ()) -> bool:
    """Whether protobuf can serialise a model, and none of it is in another file; but for these initializers."""
    import onnx_ir

    tensors = [
        value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None and not (graph is model.graph and name in elsewhere)
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    return total < INLINE_BYTES and not any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in tensors)
