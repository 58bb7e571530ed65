"""Reading a `torch.export` archive (`.pt2`) without running what is in it.

`torch.export.load` runs code from several places of an archive: pickled weights, constants and custom objects; sample inputs (it falls
back to a full unpickle); symbolic sizes (evaluated by sympy); guards (executed by `ExportedProgram.module()`); tree specifications (which
import modules); names of values, arguments and attributes (written into generated code); names of operators (looked up with `getattr`).

So the file is checked first, and torch is then given a copy that is written from what was checked: the graph (see
:mod:`bnctl.models.pt2_schema`), raw tensors, and sample inputs that load with `weights_only=True`. Other programs, compiled libraries and
extra files in the archive are not looked at. Not guarded against: a program that takes long, or much memory, when it is run.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfileobj
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UntrustedError
from bnctl.models.pt2_schema import clean_document, is_identifier, is_text
from bnctl.models.pt2_zip import TRUST_HINT, Pt2Zip, open_pt2_zip

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PROGRAM = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_PAYLOADS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
_PICKLED_PAYLOADS = ("data/weights/model.pt", "data/constants/model.pt")
_FORMAT = {"archive_format": b"pt2", "archive_version": b"0"}
_PLAIN = {"byteorder": b"little", ".data/version": b"6\n"}


def check_pt2(path: str | os.PathLike[str]) -> None:
    """Check that loading the archive runs no code of its own.

    Raises:
        ModelError: it is no `.pt2` archive, or is damaged.
        UntrustedError: something in it would run; the entry is named.
    """
    with open_pt2_zip(Path(path)) as archive:
        _checked_entries(archive)


def load_pt2(path: str | os.PathLike[str], *, trust: bool = False) -> ExportedProgram:
    """Load the program called `model`; nothing in the archive is run unless `trust` is set.

    Raises:
        ModelError: it is no `.pt2` archive, is damaged, or torch cannot read it.
        UntrustedError: something in it would run; the entry is named.
    """
    import torch

    if trust:
        return _loaded(torch.export.load, path, path)
    from torch.export.pt2_archive._package import load_pt2 as load_archive

    with open_pt2_zip(Path(path)) as archive, tempfile.TemporaryDirectory(prefix="bnctl-") as folder:
        copy = Path(folder) / "model.pt2"
        _write_copy(archive, _checked_entries(archive), copy)
        # Not torch.export.load: that takes any failure for a sign of the old format, and hides its cause.
        return _loaded(lambda file: load_archive(file).exported_programs["model"], str(copy), path)


def _loaded(load: Any, file: Any, path: str | os.PathLike[str]) -> ExportedProgram:
    try:
        return load(file)  # type: ignore[no-any-return]
    except Exception as error:
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or ["no message"]
        raise ModelError(
            f"{os.fspath(path)}: torch cannot load it: {type(error).__name__}: {last[0]}",
            hint="use the torch that wrote the file, or export the model again",
        ) from error


def _checked_entries(archive: Pt2Zip) -> dict[str, bytes | None]:
    """What goes into the copy: new bytes, or None for an entry that is taken over as it is."""
    from torch._export.serde import schema

    for name, content in _FORMAT.items():
        if archive.read(name) != content:
            raise ModelError(
                f"{archive.path}: {name} is not {content.decode()!r}", hint="use the torch that wrote the file"
            )
    if "byteorder" in archive.entries and archive.read("byteorder") != _PLAIN["byteorder"]:
        raise ModelError(
            f"{archive.path}: its tensors are not little-endian", hint="write it on a little-endian machine"
        )
    for name in _PICKLED_PAYLOADS:
        if name in archive.entries:
            raise UntrustedError(f"{archive.path}: {name} is a pickle of tensors in an older format", hint=TRUST_HINT)
    entries: dict[str, bytes | None] = {**_FORMAT, **_PLAIN}
    entries[_PROGRAM] = clean_document(schema.ExportedProgram, archive.read(_PROGRAM), f"{archive.path}: {_PROGRAM}")
    entries[_SAMPLE_INPUTS] = _checked_inputs(archive)
    for folder, name in _PAYLOADS.items():
        entries[name] = clean_document(schema.PayloadConfig, archive.read(name), f"{archive.path}: {name}")
        entries.update(dict.fromkeys(_payload_files(archive, folder, entries[name] or b"")))
    return entries


def _payload_files(archive: Pt2Zip, folder: str, config: bytes) -> list[str]:
    import json

    names = []
    for tensor, payload in json.loads(config)["config"].items():
        name = folder + payload["path_name"]
        sizes = [size.get("as_int") for size in payload["tensor_meta"]["sizes"]]
        # torch makes up zeros for an entry without bytes, however many the shape asks for.
        if not archive.entry(name).file_size and None not in sizes and math.prod(sizes):
            raise ModelError(
                f"{archive.path}: {tensor} has no values ({name} is empty)",
                hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
            )
        names.append(name)
    return names


def _checked_inputs(archive: Pt2Zip) -> bytes:
    import torch

    content = archive.read(_SAMPLE_INPUTS)
    place = f"{archive.path}: {_SAMPLE_INPUTS}"
    if not content:
        return content
    try:
        # The inner file is a zip too; an entry that unfolds to more than is there is none of torch's.
        if any(info.compress_type != zipfile.ZIP_STORED for info in zipfile.ZipFile(io.BytesIO(content)).infolist()):
            raise UntrustedError(f"{place} is compressed", hint=TRUST_HINT)
        inputs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UntrustedError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UntrustedError(f"{place} would be unpickled in full: {reason}", hint=TRUST_HINT) from error
    if not isinstance(inputs, tuple | dict) or not _is_plain(inputs):
        raise UntrustedError(f"{place} holds more than tensors and numbers in tuples, lists and dicts", hint=TRUST_HINT)
    return content


def _is_plain(value: object) -> bool:
    import torch

    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        # Keys are written into the code of the guards.
        return all((type(k) is int or is_identifier(k)) and _is_plain(v) for k, v in value.items())
    if isinstance(value, str):
        return is_text(value)
    return value is None or isinstance(value, bool | int | float | torch.Tensor | torch.dtype | torch.device)


def _write_copy(archive: Pt2Zip, entries: Mapping[str, bytes | None], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as copy:
        for name, content in entries.items():
            if content is not None:
                copy.writestr(f"model/{name}", content)
                continue
            try:
                with (
                    archive.zip.open(archive.entry(name)) as old,
                    copy.open(f"model/{name}", "w", force_zip64=True) as new,
                ):
                    copyfileobj(old, new, 1 << 20)
            except (zipfile.BadZipFile, EOFError) as error:
                raise ModelError(
                    f"{archive.path}: {name} is damaged ({error})",
                    hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
                ) from error
