"""What a `--data` word means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from bnctl.data.batches import Batches
    from bnctl.data.preprocess import Preprocess
    from bnctl.data.synthetic import InputSpec

_KINDS = "a folder of images, a .npz file, package.module:callable, or random:N"
_RANDOM = re.compile(r"random:(?P<samples>\d+)")


def open_data(
    word: str | Path,
    *,
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    inputs: Sequence[InputSpec] = (),
    seed: int = 0,
    limit: int | None = None,
) -> Batches:
    """Open data named on the command line. Nothing but listings and `.npz` files is read before the first pass.

    | word | see |
    |---|---|
    | `folder/` | :func:`bnctl.data.folder.read_folder` |
    | `file.npz` | :func:`bnctl.data.npz.read_npz` |
    | `package.module:callable` | :func:`bnctl.data.loader.read_loader` |
    | `random:N` | :func:`bnctl.data.synthetic.random_batches` |

    Args:
        word: as above.
        batch_size: samples per batch; a loader makes its own batches.
        preprocess: for folders and uint8 images.
        inputs: shapes, for `random:N`.
        seed: of random data, and of the order of a folder.
        limit: at most this many samples: evenly spaced ones of folders and files, the first ones of a loader.

    Returns:
        Batches that can be read again and again, with a length where it is known.

    Raises:
        UsageError: an option is off, or does not go with this kind of data.
        DataError: the data cannot be read.
    """
    for option, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"the {option} is {value}", hint="it must be at least 1")
    text, path = str(word), Path(word)
    _refuse_unread_kinds(text)
    if path.is_dir():
        from bnctl.data.folder import read_folder

        return read_folder(path, batch_size=batch_size, preprocess=preprocess, seed=seed, limit=limit)
    if path.suffix.lower() == ".npz":
        from bnctl.data.npz import read_npz

        return read_npz(_existing(path), batch_size=batch_size, preprocess=preprocess, limit=limit)
    if preprocess is not None:
        raise UsageError(f"--preprocess is for images, and {text} is no folder or .npz file", hint="leave it out")
    if match := _RANDOM.fullmatch(text):
        from bnctl.data.synthetic import random_batches

        samples = int(match["samples"]) if limit is None else min(int(match["samples"]), limit)
        return random_batches(samples, inputs, batch_size=batch_size, seed=seed)
    from bnctl.data.loader import is_loader_word, read_loader

    if is_loader_word(text):
        return read_loader(text, limit=limit)
    raise _unknown(text, _existing(path))


def _refuse_unread_kinds(word: str) -> None:
    if word.startswith("hf:") or word.lower().endswith((".parquet", ".tar", ".tar.gz", ".tgz")):
        raise DataError(
            f"{word}: this version does not read data of this kind yet",
            hint="write a function that yields (x, y) batches of it, and give --data package.module:function",
        )
    if word.startswith("random:") and not _RANDOM.fullmatch(word):
        raise UsageError(f"{word}: the number of samples is missing", hint="for instance random:256")


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
