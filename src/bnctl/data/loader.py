"""`package.module:callable`: a loader of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bnctl.data.batches import Batch, as_batches
from bnctl.errors import DataError, ModelError


@dataclass(frozen=True)
class LoaderData:
    """Calls the user's function anew for every pass, so that it can be a generator.

    Args:
        call: returns an iterable of batches.
        name: as the user wrote it.
        limit: end after this many samples, at the end of a batch.
    """

    call: Callable[[], Iterable[Any]]
    name: str
    limit: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        try:
            source = self.call()
            iter(source)
        except Exception as error:
            raise DataError(
                f"{self.name} fails: {type(error).__name__}: {error}",
                hint="it is called without arguments and returns an iterable of batches",
            ) from error
        samples = 0
        for batch in as_batches(source, name=self.name):
            yield batch
            samples += batch.size
            if self.limit is not None and samples >= self.limit:
                return


def open_loader(word: str, *, limit: int | None = None) -> LoaderData:
    """Find the user's function; the current folder is importable.

    Raises:
        DataError: there is no such function.
    """
    from bnctl.models.importing import import_module

    module_name, _, attribute = word.partition(":")
    try:
        call = getattr(import_module(module_name), attribute, None)
    except ModelError as error:
        raise DataError(f"--data {word}: {error.message}", hint=error.hint) from error
    if not callable(call):
        raise DataError(
            f"--data {word}: {module_name} has no function {attribute!r}", hint="give package.module:function"
        )
    return LoaderData(call, word, limit)
