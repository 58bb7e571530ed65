"""An ONNX model written into one file without a second copy of its weights in memory.

Serialising with protobuf builds a message that holds every weight, and then the bytes of that message. Here the message is built without the large
tensors, and their bytes go into the file one tensor at a time, where the encoding puts them: fields of a message may come in any order, so a graph is
all its other fields followed by its initializers, and a tensor is its other fields followed by ``raw_data``.

Source: protobuf's description of its encoding, https://protobuf.dev/programming-guides/encoding; field numbers of onnx.proto.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_SMALL_BYTES = 1024
_BYTES = 2  # the wire type of a field that says its length


def write_inline(model: onnx_ir.Model, path: Path) -> None:
    """Write a model with all its tensors inside. No tensor may be external.

    Raises:
        OSError: the file cannot be written.
    """
    import onnx

    proto, large = _without_large_tensors(model)
    heads = [_head(tensor, large) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    initializer = _tag(onnx.GraphProto, "initializer")
    entries = [(initializer + _varint(len(head) + (t.nbytes if t else 0)) + head, t) for head, t in heads]
    size = len(graph) + sum(len(head) + (tensor.nbytes if tensor else 0) for head, tensor in entries)
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _tag(onnx.ModelProto, "graph") + _varint(size) + graph)
        for head, tensor in entries:
            file.write(head)
            if tensor is not None:
                file.write(tensor.tobytes())


def _without_large_tensors(model: onnx_ir.Model) -> tuple[onnx.ModelProto, dict[str, onnx_ir.TensorProtocol]]:
    """The message with a reference in place of each large initializer of the main graph, and these by name."""
    import onnx_ir as ir

    clone = model.clone()
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in clone.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > _SMALL_BYTES:
            large[name] = tensor
            value.const_value = ir.ExternalTensor(
                "elsewhere",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
    return ir.to_proto(clone), large


def _head(
    proto: onnx.TensorProto, large: dict[str, onnx_ir.TensorProtocol]
) -> tuple[bytes, onnx_ir.TensorProtocol | None]:
    """What comes before a tensor's raw bytes; the whole tensor where it is small."""
    tensor = large.get(proto.name)
    if tensor is None:
        return proto.SerializeToString(), None
    proto.ClearField("data_location")
    proto.ClearField("external_data")
    return proto.SerializeToString() + _tag(type(proto), "raw_data") + _varint(tensor.nbytes), tensor


def _tag(message: type, field: str) -> bytes:
    number: int = message.DESCRIPTOR.fields_by_name[field].number  # type: ignore[attr-defined]
    return _varint(number << 3 | _BYTES)


def _varint(number: int) -> bytes:
    """Seven bits per byte, the lowest first; the highest bit says that more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
