"""A runner that begins before it is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from bnctl.runtime.runner import Prepared, Runner
from bnctl.runtime.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bnctl.data.batches import Batch


class Ahead:
    """A runner that runs the batch that will come first in a thread, while its owner does something else. What goes wrong there is raised when that run is
    asked for.

    Args:
        runner: open already, and with nothing more to read from the model: onnx-ir's tensors are not made for two threads.
        first: the batch. Its outputs are handed out once.
    """

    def __init__(self, runner: Runner, first: Batch) -> None:
        self._runner = runner
        self._first: Batch | None = first
        pool = ThreadPoolExecutor(1, "bnctl-ahead")
        self._outputs = pool.submit(runner.run, first)
        pool.shutdown(wait=False)

    def close(self) -> None:
        """Give up what has not begun, and wait for what has; from then on it is a runner like any other."""
        if self._outputs.cancel():
            self._first = None
        else:
            self._outputs.exception()

    @property
    def kind(self) -> Literal["onnx", "torch"]:
        """See :attr:`Runner.kind`."""
        return self._runner.kind

    @property
    def precision(self) -> str:
        """See :attr:`Runner.precision`."""
        return self._runner.precision

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """See :meth:`Runner.run`."""
        if batch is not self._first:
            return self._runner.run(batch)
        self._first = None
        return self._outputs.result()

    def observe(self, batch: Batch, layers: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """See :meth:`Runner.observe`."""
        return self._runner.observe(batch, layers) if layers else (self.run(batch), {})

    def trace(self, batch: Batch) -> Trace:
        """See :meth:`Runner.trace`."""
        return self._runner.trace(batch)

    def in_float64(self) -> Runner | None:
        """See :meth:`Runner.in_float64`."""
        return self._runner.in_float64()

    def snapshot(self) -> Callable[[], None]:
        """See :meth:`Runner.snapshot`."""
        return self._runner.snapshot()

    def perturbed(self, step: float) -> Runner | None:
        """See :meth:`Runner.perturbed`."""
        return self._runner.perturbed(step)

    def prepared(self, batch: Batch) -> AbstractContextManager[Prepared]:
        """See :meth:`Runner.prepared`."""
        return self._runner.prepared(batch)
