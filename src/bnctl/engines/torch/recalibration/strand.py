"""A coroutine out of a thread: a function that runs only while its owner waits for it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class _Closed(BaseException):
    """Unwinds a strand that nobody will resume; not an Exception, so that user code does not swallow it."""


class Strand(Generic[T]):
    """A body that can pause in the middle of calls that know nothing of it.

    Python's generators cannot pause inside a model's forward; a thread can. At any time either the owner runs or the
    strand, never both: no data are shared at once, and the order of events is the owner's.

    Args:
        body: called with ``pause``; ``pause(value)`` hands `value` to the owner and returns when resumed.
        name: of the thread.
    """

    def __init__(self, body: Callable[[Callable[[T], None]], object], name: str = "strand") -> None:
        self._body = body
        self._resumed = Semaphore(0)
        self._paused = Semaphore(0)
        self._value: T | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def resume(self) -> T | None:
        """Run to the next pause, and return what it paused with; None when the body has ended.

        Raises:
            BaseException: whatever the body raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resumed.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """End the strand, unwinding its stack where it is paused, and wait for its thread; harmless when it has ended."""
        self._closing = True
        self._resumed.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _pause(self, value: T) -> None:
        self._value = value
        if not self._closing:
            self._paused.release()
            self._resumed.acquire()
        if self._closing:
            raise _Closed

    def _run(self) -> None:
        try:
            self._body(self._pause)
        except _Closed:
            pass
        except BaseException as error:  # handed to the owner, who raises it
            self._error = error
        self._value = None
        self._paused.release()
