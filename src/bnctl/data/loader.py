"""Data from the user's own code: `package.module:callable`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from bnctl.data.batches import Batch, Batches, read_items, require_items, streamed
from bnctl.errors import BnctlError, DataError

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
        limit: stop after this many samples; the last batch is cut.

    Raises:
        DataError: now: the import fails, or there is no such callable. During a pass: the call or the iteration fails, or an
            item is no batch.
    """
    call, returned = resolve(word), _Returned(word)

    def read() -> Iterator[Batch]:
        batches = read_items(_items(call, word, returned), word)
        return batches if limit is None else _first(batches, limit)

    return streamed(read)


def _first(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    left = limit
    for batch in batches:
        yield batch if batch.size <= left else batch.rows(np.arange(left))
        left -= batch.size
        if left <= 0:
            return


class _Returned:
    """Notices a callable that hands out the same iterator twice, the second time without what was taken from it."""

    def __init__(self, word: str) -> None:
        self._word = word
        self._last: Any = None

    def check(self, found: Any) -> None:
        iterator = found if isinstance(found, Iterator) else None  # nothing else is held: it may be large
        if iterator is not None and iterator is self._last:
            raise DataError(
                f"{self._word} returned the same iterator again, and a second pass is needed",
                hint="let it make a new one in each call, or return a list or a DataLoader",
            )
        self._last = iterator


def _items(call: Callable[[], Any], word: str, returned: _Returned) -> Iterator[Any]:
    from bnctl.models.importing import current_folder_importable

    with current_folder_importable():
        found = _called(call, word)
        require_items(found, f"what {word} returns")
        returned.check(found)
        items = iter(found)
    end = object()
    while True:
        with current_folder_importable():  # while the user's code runs, not while the batch is in use
            item = next(items, end)
        if item is end:
            return
        yield item


def _called(call: Callable[[], Any], word: str) -> Any:
    try:
        return call()
    except BnctlError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{word}() fails: {_cause(error)}", hint="it is called without arguments") from error


def resolve(word: str) -> Callable[..., Any]:
    """The callable that `package.module:callable` names; the current folder is importable.

    Raises:
        DataError: the import fails, or there is no such callable.
    """
    from bnctl.models.importing import current_folder_importable, import_module

    module_name, _, attribute = word.partition(":")
    try:
        with current_folder_importable():
            found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{word}: no module named {error.name}", hint="install it, or run bnctl in the folder that holds it"
        ) from error
    except (Exception, SystemExit) as error:  # a module that ends the process on import must not end bnctl
        raise DataError(f"{word}: importing {module_name} fails: {_cause(error)}", hint="the cause is in it") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")])
            hint = f"did you mean {' or '.join(near)}?" if near else "name a function of that module"
            raise DataError(f"{word}: {module_name} has no {attribute}", hint=hint)
        found = getattr(found, name)
    if not callable(found):
        raise DataError(f"{word} is a {type(found).__name__}, not callable", hint="name a function")
    return found  # type: ignore[no-any-return]


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
