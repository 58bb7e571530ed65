"""Arrays of a numpy archive, mapped where they lie in the file as they are."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_CHUNK_BYTES = 1 << 20

Map = np.memmap[Any, np.dtype[Any]]


def map_arrays(path: Path) -> dict[str, Map]:
    """Read-only maps of the arrays that `np.savez` stored, by name; their checksums are verified in one pass over the file.

    They need not be aligned. Left out is what numpy has to read, or refuse: compressed arrays, objects, arrays without elements, and those
    that say more than there is.

    Raises:
        BadZipFile, EOFError, ValueError, RuntimeError: the archive is damaged, or encrypted.

    Source: APPNOTE.TXT 4.3.7 (local file header), numpy.lib.format.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        stored = [info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
        found = {info.filename: _map(path, file, archive, info) for info in stored}
    return {name.removesuffix(".npy"): array for name, array in found.items() if array is not None}


def _map(path: Path, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Map | None:
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version not in _READ_HEADER:
            return None
        shape, fortran_order, dtype = _READ_HEADER[version](member)
        skipped = member.tell()
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or not size or skipped + size > info.file_size:
            return None
        while member.read(_CHUNK_BYTES):
            pass  # at the end zipfile compares the checksum
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    offset = info.header_offset + 30 + name_length + extra_length + skipped
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")
