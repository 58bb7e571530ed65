"""The outside of a `.pt2` archive: a zip file that is read with suspicion.

Two readers may see two different archives in one file (names twice, names that differ in case, compressed entries that unfold to
gigabytes). So only the plain shape that torch writes is accepted: one root folder, every name once, every entry stored as it is.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType

from bnctl.errors import ModelError, UntrustedError

LEGACY_ENTRY = "serialized_exported_program.json"
TRUST_HINT = "--trust, if you know where this file comes from; or export the model again with torch.export.save"


@dataclass(frozen=True)
class Pt2Zip:
    """An open archive whose outside has been checked; a context manager.

    Args:
        path: the file.
        zip: the open file.
        entries: what is in it, by name below the root folder.
    """

    path: Path
    zip: zipfile.ZipFile
    entries: Mapping[str, zipfile.ZipInfo]

    def read(self, name: str) -> bytes:
        """The bytes of an entry.

        Raises:
            ModelError: there is no such entry, or it is damaged.
        """
        try:
            return self.zip.read(self.entry(name))
        except (zipfile.BadZipFile, OSError, EOFError, struct.error) as error:
            raise ModelError(
                f"{self.path}: {name} is damaged ({error})",
                hint="the archive is damaged, or of a version that bnctl does not know: write it again with torch.export.save",
            ) from error

    def entry(self, name: str) -> zipfile.ZipInfo:
        """The directory entry called `name`.

        Raises:
            ModelError: there is none.
        """
        if name not in self.entries:
            raise ModelError(f"{self.path} holds no {name}", hint="export the model again with torch.export.save")
        return self.entries[name]

    def __enter__(self) -> Pt2Zip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.zip.close()


def open_pt2_zip(path: Path) -> Pt2Zip:
    """Open an archive and check its outside.

    Raises:
        ModelError: it is no zip file, or is damaged.
        UntrustedError: it is in the old, pickled format, or not in the plain shape that torch writes.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise ModelError(
            f"{path} is not a .pt2 archive: {error}", hint="it may be cut off: copy it again, or export it again"
        ) from error
    try:
        return Pt2Zip(path, archive, _checked(path, archive.infolist()))
    except BaseException:
        archive.close()
        raise


def _checked(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    names = [info.orig_filename for info in infos]
    if LEGACY_ENTRY in names:
        raise UntrustedError(
            f"{path}: {LEGACY_ENTRY}: this is the format of torch 2.7 and before, which is unpickled", hint=TRUST_HINT
        )
    folded: set[str] = set()
    for info, name in zip(infos, names, strict=True):
        if reason := _odd(info, name, folded):
            raise UntrustedError(f"{path}: entry {name!r} {reason}", hint=TRUST_HINT)
        folded.add(name.casefold())
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise UntrustedError(f"{path}: its entries overlap", hint=TRUST_HINT)
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1:
        raise UntrustedError(f"{path}: its entries are in {len(roots)} root folders, and not in one", hint=TRUST_HINT)
    return {name.partition("/")[2]: info for info, name in zip(infos, names, strict=True)}


def _odd(info: zipfile.ZipInfo, name: str, seen: set[str]) -> str | None:
    if name != info.filename or "\\" in name or str(PurePosixPath(name)) != name or name.startswith("/"):
        return "has an odd name"
    if {".", ".."} & set(name.split("/")):
        return "leaves the archive"
    if name.casefold() in seen:
        return "is there twice"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        return "is compressed"
    if info.flag_bits & 0x1:
        return "is encrypted"
    return None
