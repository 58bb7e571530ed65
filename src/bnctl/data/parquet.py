"""Data in parquet files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bnctl.data.batches import Batch, CountedBatches, located
from bnctl.data.preprocess import Preprocess
from bnctl.data.tables import choose_columns, read_tables
from bnctl.errors import DataError


def read_parquet(
    paths: Sequence[Path],
    *,
    word: str,
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    workers: int = 0,
) -> CountedBatches:
    """Batches of parquet files with the same columns, one after the other; one row group is in memory at a time.

    Read by pyarrow and not by the `datasets` library, whose streams end the process when they are left early (apache/arrow#45214); what
    that library notes in the files is understood. See :func:`bnctl.data.tables.choose_columns` and :func:`bnctl.data.tables.read_tables`.

    Args:
        paths: at least one.
        word: what to call the data in errors.
        batch_size: samples per batch; the last batch may be smaller.
        preprocess: for images; left out, encoded images are RGB, (N, 3, H, W) float32 between 0 and 1.
        limit: the first samples, at most this many.
        workers: threads that decode ahead; the batches are the same for any number.

    Raises:
        DataError: now: pyarrow is missing, a file is damaged, has other columns than the first, or none that can be an input; there are no
            samples. During a pass: see :func:`bnctl.data.tables.read_tables`.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{word}: the library pyarrow is missing", hint="pip install 'bnctl[data]'") from error
    headers = [_read(path, parquet.read_metadata) for path in paths]
    schema = headers[0].schema.to_arrow_schema()
    for path, header in zip(paths, headers, strict=True):
        if not header.schema.to_arrow_schema().equals(schema):
            raise DataError(f"{path} has other columns than {paths[0]}", hint="give it as data of its own")
    columns = choose_columns(schema, word)
    groups = [(path, i) for path, header in zip(paths, headers, strict=True) for i in range(header.num_row_groups)]
    sizes = [header.row_group(i).num_rows for header in headers for i in range(header.num_row_groups)]
    bounds = [0, *accumulate(sizes)]
    samples = bounds[-1] if limit is None else min(bounds[-1], limit)
    if not samples:
        raise DataError(f"{word} holds no samples", hint="give data that are not empty")

    def load(number: int) -> Any:
        path, group = groups[number]
        with _read(path, parquet.ParquetFile) as file:
            return _read(path, lambda _: file.read_row_group(group, columns.names))

    def tables(places: Iterable[slice]) -> Iterator[tuple[int, Any]]:
        loaded, table = -1, pyarrow.table({})
        for place in places:
            parts, row = [], place.start
            while row < place.stop:
                number = bisect_right(bounds, row) - 1
                if number != loaded:
                    loaded, table = number, load(number)
                end = min(place.stop, bounds[number + 1])
                parts.append(table.slice(row - bounds[number], end - row))
                row = end
            yield place.start, pyarrow.concat_tables(parts)

    def read(places: Iterable[slice]) -> Iterator[Batch]:
        return read_tables(
            tables(places),
            columns,
            fetch=lambda name: Path(name).open("rb"),
            preprocess=preprocess,
            workers=workers,
            source=word,
        )

    return located(samples, batch_size, read)


def _read(path: Path, call: Callable[[Path], Any]) -> Any:
    try:
        return call(path)
    except Exception as error:  # pyarrow's errors have no base of their own
        raise DataError(f"{path} cannot be read: {error}", hint="is it a parquet file, and whole?") from error
