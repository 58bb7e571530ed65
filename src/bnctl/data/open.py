"""What a `--data` word means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from bnctl.data.batches import Batches
    from bnctl.data.preprocess import Preprocess
    from bnctl.data.synthetic import InputSpec

_KINDS = "a folder of images, a .npz or .parquet file, shards/*.tar, hf:NAME, package.module:callable, or random:N"
_RANDOM = re.compile(r"random:(?P<samples>\d+)")


def open_data(
    word: str | Path,
    *,
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    inputs: Sequence[InputSpec] = (),
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
) -> Batches:
    """Open data named on the command line. Before the first pass, only listings, headers and `.npz` files are read.

    | word | see |
    |---|---|
    | `folder/` | :func:`bnctl.data.folder.read_folder` |
    | `file.npz` | :func:`bnctl.data.npz.read_npz` |
    | `file.parquet`, or a glob of them | :func:`bnctl.data.parquet.read_parquet` |
    | `file.tar`, `shards/*.tar`, `hf:NAME`, `hf:NAME:SPLIT` | :func:`bnctl.data.streams.read_stream` |
    | `package.module:callable` | :func:`bnctl.data.loader.read_loader` |
    | `random:N` | :func:`bnctl.data.synthetic.random_batches` |

    Args:
        word: as above.
        batch_size: samples per batch; a loader makes its own batches.
        preprocess: for images, and uint8 arrays of images.
        inputs: shapes, for `random:N`.
        seed: of random data, and of the order of a folder.
        limit: at most this many samples: evenly spaced ones of folders and `.npz` files, the first ones of all others.
        workers: threads that decode images ahead (0: none); the batches are the same for any number.

    Returns:
        Batches that can be read again and again, with a length where it is known.

    Raises:
        UsageError: an option is off, or does not go with this kind of data.
        DataError: the data cannot be read.
    """
    for option, value, least in (("batch size", batch_size, 1), ("limit", limit, 1), ("number of workers", workers, 0)):
        if value is not None and value < least:
            raise UsageError(f"the {option} is {value}", hint=f"it must be at least {least}")
    text, path = str(word), Path(word)
    kind = path.suffix.lower()
    options: dict[str, Any] = {"batch_size": batch_size, "preprocess": preprocess, "limit": limit}
    if path.is_dir():
        from bnctl.data.folder import read_folder

        return read_folder(path, seed=seed, workers=workers, **options)
    if text.startswith("hf:"):
        from bnctl.data.streams import read_stream

        name, _, split = text.removeprefix("hf:").partition(":")
        if not name:
            raise UsageError(f"{text} names no dataset", hint="for instance hf:uoft-cs/cifar10:test")
        return read_stream(name, word=text, split=split or "train", workers=workers, **options)
    if kind == ".tar":
        from bnctl.data.streams import read_stream

        return read_stream("webdataset", word=text, files=_files(path), workers=workers, **options)
    if kind == ".parquet":
        from bnctl.data.parquet import read_parquet

        return read_parquet(_files(path), word=text, workers=workers, **options)
    if kind == ".npz":
        from bnctl.data.npz import read_npz

        return read_npz(_existing(path), **options)
    if preprocess is not None:
        raise UsageError(f"--preprocess is for images of folders and files, and {text} is neither", hint="leave it out")
    if text.startswith("random:"):
        from bnctl.data.synthetic import random_batches

        match = _RANDOM.fullmatch(text)
        if match is None:
            raise UsageError(f"{text}: the number of samples is missing", hint="for instance random:256")
        samples = int(match["samples"]) if limit is None else min(int(match["samples"]), limit)
        return random_batches(samples, inputs, batch_size=batch_size, seed=seed)
    from bnctl.data.loader import is_loader_word, read_loader

    if is_loader_word(text):
        return read_loader(text, limit=limit)
    raise _unknown(text, _existing(path))


def data_files(word: str) -> list[Path]:
    """The files that a word for data names: one, those that a glob finds, or all below a folder, sorted; none for other kinds of data."""
    path = Path(word)
    if path.is_dir():
        return sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    try:
        return _files(path)
    except (DataError, ValueError, OSError):
        return []


def _files(path: Path) -> list[Path]:
    """The file, or those that a glob finds, sorted."""
    if path.is_file():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) or [_existing(path)]


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        raise DataError(f"{path}: there is no folder {path.parent}", hint=f"data are {_KINDS}") from None
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    raise DataError(
        f"{path}: no such file or folder", hint=f"did you mean {' or '.join(near)}?" if near else f"data are {_KINDS}"
    )


def _unknown(word: str, path: Path) -> DataError:
    if path.suffix.lower() == ".npy":
        return DataError(f"{word} holds a single array without a name", hint="store it with np.savez(file, x=array)")
    return DataError(f"{word}: not a kind of data that bnctl reads", hint=f"data are {_KINDS}")
