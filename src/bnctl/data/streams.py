"""Data that the `datasets` library streams: webdataset, and the hub."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from bnctl.data.batches import Batch, Batches
from bnctl.data.preprocess import Preprocess
from bnctl.data.tables import Columns, choose_columns, read_tables
from bnctl.errors import DataError

_LOGGERS = ("datasets", "huggingface_hub")
_CHECK = "name files that are whole, or hf:NAME:SPLIT, for instance hf:uoft-cs/cifar10:test"


def read_stream(
    source: str,
    *,
    word: str,
    split: str = "train",
    files: Sequence[Path] = (),
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    workers: int = 0,
) -> Batches:
    """Batches of what `datasets.load_dataset(streaming=True)` gives, in its order; a few batches are in memory at a time.

    See :func:`bnctl.data.tables.choose_columns` and :func:`bnctl.data.tables.read_tables`.

    Args:
        source: "webdataset", with files; else a name on the hub, or a folder that the library reads.
        word: what to call the data in errors.
        split: of the dataset.
        files: paths.
        batch_size: samples per batch; the last batch may be smaller.
        preprocess: for images; left out, encoded images are RGB, (N, 3, H, W) float32 between 0 and 1.
        limit: stop after this many samples.
        workers: threads that decode ahead; the batches are the same for any number.

    Raises:
        DataError: now: the library is missing, the data cannot be opened, or no column can be an input. During a pass: there are no samples,
            they cannot be read, or see :func:`bnctl.data.tables.read_tables`.
    """
    with _quiet():
        dataset, columns = _selected(_opened(word, source, split, files), word)

    def read(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        tables = islice(_tables(dataset, batch_size, limit, word), first, None, step)
        options: dict[str, Any] = {"preprocess": preprocess, "workers": workers, "source": word}
        for batch in read_tables(tables, columns, fetch=_fetched, **options):
            yield batch.start // batch_size, batch

    return Batches(read)


def _opened(word: str, source: str, split: str, files: Sequence[Path]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{word}: the library datasets is missing", hint="pip install 'bnctl[data]'") from error
    options = {"data_files": [str(file) for file in files]} if files else {}
    try:
        return datasets.load_dataset(source, split=split, streaming=True, **options)
    except Exception as error:  # its builders and the network raise anything
        raise DataError(f"{word} cannot be opened: {type(error).__name__}: {error}", hint=_CHECK) from error


def _selected(dataset: Any, word: str) -> tuple[Any, Columns]:
    """The dataset as tables of the columns to read."""
    if dataset.features is None:
        _, table = next(_tables(dataset.with_format("arrow"), 1, 1, word))
        schema = table.schema
    else:
        schema = dataset.features.arrow_schema
    columns = choose_columns(schema, word)
    return dataset.select_columns(columns.names).with_format("arrow"), columns


def _tables(dataset: Any, batch_size: int, limit: int | None, word: str) -> Iterator[tuple[int, Any]]:
    """Tables, each with the number of its first sample."""
    start = 0
    tables = dataset.iter(batch_size=batch_size)
    try:
        while limit is None or start < limit:
            try:
                with _quiet():
                    table = next(tables, None)
            except Exception as error:  # its readers raise anything
                cause = f"{type(error).__name__}: {error}"
                raise DataError(f"{word} cannot be read from sample {start} on: {cause}", hint=_CHECK) from error
            if table is None:
                break
            yield start, table if limit is None else table.slice(0, limit - start)
            start += len(table)
    finally:
        # What is left of a stream of parquet would end the process at its exit: apache/arrow#45214, huggingface/datasets#7566.
        tables.close()
        gc.collect()
    if not start:
        raise DataError(f"{word} holds no samples", hint="give data that are not empty")


def _fetched(path: str) -> BinaryIO:
    """A file of a dataset: on disk, in an archive, or on the hub."""
    import fsspec

    return fsspec.open(path, "rb").open()  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings and log: what goes wrong is an error of ours."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
