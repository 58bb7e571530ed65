"""ONNX files in and out, with external data that stays where it belongs.

A tensor of an ONNX file may say that its bytes are in another file. A file made to do harm names one outside its folder
(`../../.ssh/id_rsa`, an absolute path, a link), and the bytes leave with the next model that is written. So every external tensor,
wherever in the file it is (initializers, attributes, subgraphs, functions, sparse tensors), is checked before any is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UsageError
from bnctl.models.onnx_sound import make_sound, refuse_what_is_not_kept
from bnctl.models.onnx_stream import write_inline
from bnctl.models.spec import require_file
from bnctl.models.write import flush, publish, refuse_existing, staging

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# A protobuf message ends at 2 GiB; the graph itself needs room too.
_LARGEST_INLINE_BYTES = 1_900_000_000

_SOURCE = "bnctl.source"


@dataclass(frozen=True)
class _Source:
    """The file that a model was read from, and those of its external data."""

    file: Path
    data: frozenset[Path]


def check_external_data(path: str | os.PathLike[str]) -> None:
    """Check that every external tensor of the file lies in a regular file in the same folder (or below), and within that file.

    Raises:
        ModelError: the file is not ONNX, or a tensor's data lie elsewhere; the tensor is named.
    """
    file = Path(path)
    _check_external(_parsed(_content(file), file), file)


def load_onnx(path: str | os.PathLike[str]) -> onnx_ir.Model:
    """Read a model; external initializers stay on disk and are mapped into memory when they are used.

    External tensors elsewhere (attributes, functions) are read at once: they are small, and writing them again needs them.

    Raises:
        ModelError: see :func:`check_external_data` and :mod:`bnctl.models.onnx_sound`.
    """
    file = Path(path)
    return _model(_parsed(_content(file), file), file)


def load_with_digest(path: str | os.PathLike[str]) -> tuple[onnx_ir.Model, str]:
    """As :func:`load_onnx`, with the SHA-256 of the file, in hexadecimal. The file is read once and hashed while it is parsed."""
    import bnctl.engines.onnx  # noqa: F401  (it imports onnx-ir, and better before there are threads)

    file = Path(path)
    content = _content(file)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(lambda: sha256(content).hexdigest())
        return _model(_parsed(content, file), file), digest.result()


def _model(proto: onnx.ModelProto, file: Path) -> onnx_ir.Model:
    import onnx_ir
    from onnx.external_data_helper import load_external_data_for_tensor

    _check_external(proto, file)
    refuse_what_is_not_kept(proto, str(file))
    folder = str(file.resolve().parent)
    try:
        for tensor, mapped in _external_tensors(proto):
            if not mapped:
                load_external_data_for_tensor(tensor, folder)
        model = onnx_ir.from_proto(proto)
        # The absolute folder: with an empty one, onnx-ir would skip its own checks when it maps the file.
        onnx_ir.external_data.set_base_dir(model.graph, folder)
        _list_initializers(model)
        _say_once(model)
        model.graph.meta[_SOURCE] = _Source(file.resolve(), _locations(proto, file))
    except Exception as error:
        raise _unreadable(error, str(file), "the file is damaged, or not of this kind: write it again") from error
    make_sound(model, str(file))
    return model


def from_proto(proto: onnx.ModelProto, name: str) -> onnx_ir.Model:
    """A model that somebody holds in memory.

    Raises:
        ModelError: it is not valid, see :mod:`bnctl.models.onnx_sound`.
    """
    import onnx_ir

    refuse_what_is_not_kept(proto, name)
    try:
        model = onnx_ir.from_proto(proto)
    except Exception as error:
        raise _unreadable(error, name, "see what onnx.checker says") from error
    make_sound(model, name)
    return model


def _unreadable(error: BaseException, name: str, hint: str) -> ModelError:
    """What onnx-ir does not read: it says why in the first of the errors that led to this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [""])[0]
    if "Map types" in reason:
        return ModelError(
            f"{name} has values of map type, which bnctl does not read",
            hint="take ZipMap off the end, for instance by exporting with options={'zipmap': False}",
        )
    return ModelError(f"{name} is not a valid ONNX model: {type(error).__name__}: {reason}", hint=hint)


def _say_once(model: onnx_ir.Model) -> None:
    """Metadata of a tensor that onnx-ir writes from its message as well as from what it read there."""
    from onnx_ir.serde import TensorProtoTensor

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, TensorProtoTensor):
                del value.const_value.raw.metadata_props[:]


def _list_initializers(model: onnx_ir.Model) -> None:
    """Before IR version 4 every initializer must be listed as an input, and is a constant all the same. Files in which some are not run, but are not valid."""
    from bnctl.engines.onnx.shapes import IR_VERSION_WITH_DEFAULTS

    if model.ir_version < IR_VERSION_WITH_DEFAULTS:
        model.graph.inputs.extend(v for v in model.graph.initializers.values() if not v.is_graph_input())


def save_onnx(
    model: onnx_ir.Model,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> str:
    """Write a model in one step, its large tensors to `<path>.data` beside it where it had external data or is above 1.9 GB.

    The data file is in place before the model that refers to it. `check` is given the complete file before it is put in place.

    Returns:
        The SHA-256 of the model's file, in hexadecimal.

    Raises:
        UsageError: the output, or the data file it needs, exists and `force` is not set; or the data file belongs to another model.
        ModelError: it cannot be written.
    """
    import onnx_ir

    target = Path(path)
    data = target.with_name(f"{target.name}.data")
    external = _needs_external_data(model)
    outputs = [data, target] if external else [target]
    if external:
        _refuse_data_of_others(model, target, data)
    for output in outputs:
        refuse_existing(output, force=force)
    with staging(target) as folder:
        try:
            if external:
                onnx_ir.save(model, folder / target.name, external_data=data.name)
            else:
                write_inline(model, folder / target.name)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{target} cannot be written: {type(error).__name__}: {error}",
                hint="is there room on the disk, and may you write there? Nothing was written",
            ) from error
        with (folder / target.name).open("rb") as written, ThreadPoolExecutor(2) as pool:
            pool.submit(flush, folder)  # so that there is less to wait for when the file is put in place
            digest = pool.submit(file_digest, written, "sha256")
            if check is not None:
                check(folder / target.name)
            for output in outputs:
                # No data file is written when every tensor is small.
                if (folder / output.name).exists():
                    publish(folder / output.name, output, force=force)
            return digest.result().hexdigest()


def source_of(model: onnx_ir.Model) -> Path | None:
    """The file that a model was read from, where it is still there."""
    source: _Source | None = model.graph.meta.get(_SOURCE)
    return source.file if source is not None and source.file.is_file() else None


def _refuse_data_of_others(model: onnx_ir.Model, target: Path, data: Path) -> None:
    """A data file is replaced together with the model that it belongs to, or not at all."""
    source: _Source | None = model.graph.meta.get(_SOURCE)
    if not os.path.lexists(data):
        return
    if source is not None and data.resolve() in source.data:
        if source.file == target.resolve():
            return
        raise UsageError(f"{data} holds the weights of {source.file.name}, which is read", hint="give another output")
    if not target.is_file() or data.resolve() not in _data_files(target):
        raise UsageError(
            f"{data} exists already, and is not the data file of {target}", hint="give another output, or move it away"
        )


def _data_files(path: Path) -> frozenset[Path]:
    """The files with external data that an ONNX file names."""
    try:
        proto = _parsed(_content(path), path)
    except ModelError:
        return frozenset()
    return _locations(proto, path)


def _locations(proto: onnx.ModelProto, path: Path) -> frozenset[Path]:
    entries = (entry for tensor, _ in _external_tensors(proto) for entry in tensor.external_data)
    return frozenset((path.resolve().parent / e.value).resolve() for e in entries if e.key == "location")


def _content(path: Path) -> bytes:
    require_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="may you read it?") from error


def _parsed(content: bytes, path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load_model_from_string(content)
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{path} is not an ONNX file, or is cut off: {error}", hint="copy or export it again"
        ) from error
    # An empty file, and many that are not ONNX, decode to an empty message.
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(f"{path} is not an ONNX file: it holds no graph", hint="copy or export it again")
    return proto


def _external_tensors(message: Any, *, mapped: bool = True) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every external tensor below a protobuf message, and whether onnx-ir maps it (an initializer of a graph, not in a function)."""
    import onnx

    for field in message.DESCRIPTOR.fields:
        if field.message_type is None:
            continue
        value = getattr(message, field.name)
        children = value if field.is_repeated else [value] if message.HasField(field.name) else []
        for child in children:
            if isinstance(child, onnx.TensorProto):
                if child.data_location == onnx.TensorProto.EXTERNAL:
                    yield child, mapped and field.name == "initializer"
            else:
                yield from _external_tensors(child, mapped=mapped and field.name != "functions")


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.resolve().parent
    for tensor, _ in _external_tensors(proto):
        if reason := _problem(tensor, folder):
            raise ModelError(
                f"{path}: tensor {tensor.name or '(unnamed)'}: {reason}",
                hint="keep external data as plain files in the model's own folder",
            )


def _problem(tensor: onnx.TensorProto, folder: Path) -> str | None:
    """What is wrong with where an external tensor says that its bytes are."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if len(entries) != len(tensor.external_data):
        return "its external data are described twice"
    if not location or "\x00" in location:
        return "it is external and names no file"
    if (
        Path(location).is_absolute()
        or PureWindowsPath(location).anchor
        or "\\" in location
        or ".." in Path(location).parts
    ):
        return f"its data are at {location!r}, outside the model's folder"
    file = folder / location
    try:
        real = file.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        return f"its data file {location!r} cannot be read ({error})"
    if not real.is_relative_to(folder):
        return f"its data file {location!r} is a link to {real}, outside the model's folder"
    if not stat.S_ISREG(status.st_mode):
        return f"{location!r} is not a regular file"
    # A second name of a file somewhere else looks just like this; onnx and onnx-ir refuse it too.
    if status.st_nlink > 1:
        return f"its data file {location!r} has {status.st_nlink} hard links"
    return _range_problem(tensor, entries, location, status.st_size)


def _range_problem(tensor: onnx.TensorProto, entries: dict[str, str], location: str, size: int) -> str | None:
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            return f"its {key} {text!r} is not a number of bytes"
        numbers[key] = int(text)
    needed = _size_bytes(tensor)
    if needed is None:
        return "its type or shape cannot be external"
    if "length" in entries and numbers["length"] != needed:
        return f"its length is {numbers['length']} bytes, and its shape and type need {needed}"
    if numbers["offset"] + needed > size:
        return f"it ends at byte {numbers['offset'] + needed} of {location!r}, which has {size}"
    return None


def _size_bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes of the tensor's values by its shape and type (packed for types below a byte); None where that makes no sense."""
    import math

    import onnx_ir

    try:
        bits = int(onnx_ir.DataType(tensor.data_type).bitwidth)
    except (TypeError, ValueError, KeyError):
        return None
    if any(dim < 0 for dim in tensor.dims):
        return None
    size_bits: int = math.prod(tensor.dims) * bits
    return -(-size_bits // 8)


def _needs_external_data(model: onnx_ir.Model) -> bool:
    import onnx_ir

    values = [
        v.const_value for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None
    ]
    return (
        any(isinstance(v, onnx_ir.ExternalTensor) for v in values)
        or sum(v.nbytes for v in values) > _LARGEST_INLINE_BYTES
    )
