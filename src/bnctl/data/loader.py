"""Data from the user's own code: `package.module:callable`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bnctl.data.batches import Batch, Batches, read_items

_WORD = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attr>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def is_loader_word(word: str) -> bool:
    """Whether a word has the form `package.module:callable`."""
    return _WORD.fullmatch(word) is not None


def read_loader(word: str, *, limit: int | None = None) -> Batches:
    """Batches of what a callable returns: an iterable of batches, see :func:`bnctl.data.batches.as_batches`.

    The callable is called without arguments, anew for each pass, so that it may return a generator. It decides on the size of
    its batches and their order. The current folder is importable, also while the batches are made.

    Args:
        word: `package.module:callable`.
        limit: stop after this many samples.

    Raises:
        DataError: now: the import fails, or there is no such callable. During a pass: the call or the iteration fails, or an
            item is no batch.
    """
    call = _resolve(word)

    def read() -> Iterator[Batch]:
        batches = read_items(_within_current_folder(call, word), word)
        return batches if limit is None else _first(batches, limit)

    return Batches(read)


def _first(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    left = limit
    for batch in batches:
        yield batch if batch.size <= left else batch.first(left)
        left -= batch.size
        if left <= 0:
            return


def _within_current_folder(call: Callable[[], Any], word: str) -> Iterator[Any]:
    from bnctl.models.importing import current_folder_importable

    with current_folder_importable():
        items = iter(as_items(_called(call, word), word))
    end = object()
    while True:
        with current_folder_importable():  # only while the user's code runs, not while the batch is used
            item = next(items, end)
        if item is end:
            return
        yield item
