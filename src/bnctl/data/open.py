"""What a `--data` word means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bnctl.data.batches import Batch
from bnctl.data.folder import open_folder
from bnctl.data.loader import open_loader
from bnctl.data.npz import open_npz
from bnctl.data.preprocess import Preprocess
from bnctl.data.synthetic import InputSpec, open_random
from bnctl.errors import DataError


def open_data(
    word: str,
    *,
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    inputs: Sequence[InputSpec] = (),
    seed: int = 0,
    limit: int | None = None,
) -> Iterable[Batch]:
    """Batches of what a word names; they can be gone through several times.

    | word | is |
    |---|---|
    | `folder/` | one subfolder per class, images in them |
    | `file.npz` | arrays `x` and `y` |
    | `package.module:callable` | returns an iterable of batches |
    | `random:N` | N synthetic samples of the shapes in `inputs` |

    Raises:
        DataError: there is no such thing, it cannot be read, or this version does not read it yet (parquet, webdataset, hub).
    """
    path = Path(word)
    if word.startswith("random:"):
        return open_random(word, inputs=inputs, batch_size=batch_size, seed=seed, limit=limit)
    if word.startswith("hf:") or path.suffix in {".parquet", ".tar"}:
        raise DataError(
            f"--data {word}: this version does not read it yet",
            hint="write a loader and give it as --data package.module:callable",
        )
    if path.is_dir():
        return open_folder(path, batch_size=batch_size, preprocess=preprocess, limit=limit)
    if path.suffix == ".npz":
        return open_npz(path, batch_size=batch_size, preprocess=preprocess, limit=limit)
    if ":" in word and not path.exists():
        return open_loader(word, limit=limit)
    if not path.exists():
        raise DataError(
            f"--data {word} does not exist", hint="give folder/, file.npz, package.module:callable or random:N"
        )
    raise DataError(f"--data {word}: unknown kind of file", hint="give an .npz with arrays x and y, or an image folder")
