"""A coroutine out of a thread: a function that pauses in the middle of calls that know nothing of it; and who runs many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from operator import itemgetter
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class _Closed(BaseException):
    """Unwinds a strand that nobody will resume; not an Exception, so that user code does not swallow it."""


class Strand(Generic[T]):
    """A body that can pause.

    Python's generators cannot pause inside a model's forward; a thread can.

    Args:
        body: called with ``pause``; ``pause(value)`` hands `value` to the owner and returns when resumed.
        name: of the thread.

    Attributes:
        value: what it paused with last; None once the body has ended.
        error: what the body raised.
    """

    def __init__(self, body: Callable[[Callable[[T], None]], object], name: str = "strand") -> None:
        self.value: T | None = None
        self.error: BaseException | None = None
        self._body = body
        self._turn = Lock()  # taken by the strand, and released by who resumes it
        self._turn.acquire()
        self._inbox: SimpleQueue[Strand[T]] | None = None
        self._closing = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def resume(self, inbox: SimpleQueue[Strand[T]]) -> None:
        """Let it run; it comes to `inbox` at its next pause, or at the end."""
        self._inbox = inbox
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()

    def close(self) -> None:
        """End it, unwinding its stack at its next pause, and wait for its thread; harmless when it has ended."""
        self._closing = True
        if self._thread.ident is not None:
            if self._turn.locked():
                self._turn.release()
            self._thread.join()

    def _pause(self, value: T) -> None:
        if not self._closing:
            self.value = value
            self._hand_over()
            self._turn.acquire()
        if self._closing:
            raise _Closed

    def _run(self) -> None:
        try:
            self._body(self._pause)
        except _Closed:
            pass
        except BaseException as error:  # handed to the owner, who raises it
            self.error = error
        self.value = None
        self._hand_over()

    def _hand_over(self) -> None:
        assert self._inbox is not None, "it runs only when resumed"
        self._inbox.put(self)


class Crew:
    """Lets work run in threads, so many pieces at a time.

    Args:
        hands: how many.
    """

    def __init__(self, hands: int) -> None:
        self._hands = hands
        self._pool = ThreadPoolExecutor(hands, "hand")

    def dismiss(self) -> None:
        """Let the threads end."""
        self._pool.shutdown()

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> Iterator[T]:
        """Call `work` with each item; items come back in their order. One item more than there are hands is taken from the iterable: it is loaded
        meanwhile.

        The threads stay: torch builds its convolutions anew when a thread first runs one.

        Raises:
            BaseException: what `work` raised; of several, the one that comes first in the iterable, whatever the timing.
        """
        coming, running = iter(items), deque[tuple[T, Future[object]]]()
        try:
            while True:
                running.extend(
                    (item, self._pool.submit(work, item)) for item in islice(coming, self._hands + 1 - len(running))
                )
                if not running:
                    return
                item, done = running.popleft()
                done.result()
                yield item
        finally:
            wait([done for _, done in running])

    def run(self, strands: Iterable[Strand[T]]) -> Iterator[Strand[T]]:
        """Resume each once; they come back as they pause or end. Strands are taken from the iterable only when there is a hand free.

        Raises:
            BaseException: what a body raised; of several, the one that comes first in the iterable, whatever the timing.
        """
        inbox: SimpleQueue[Strand[T]] = SimpleQueue()
        coming, running, failed = iter(strands), list[Strand[T]](), list[tuple[int, BaseException]]()
        order: dict[Strand[T], int] = {}
        try:
            while True:
                for strand in islice(coming, 0 if failed else self._hands - len(running)):
                    order[strand] = len(order)
                    running.append(strand)
                    strand.resume(inbox)
                if not running:
                    break
                strand = inbox.get()
                running.remove(strand)
                if strand.error is not None:
                    failed.append((order[strand], strand.error))
                elif not failed:
                    yield strand
        finally:
            for strand in running:
                strand.close()
        if failed:
            raise min(failed, key=itemgetter(0))[1]
