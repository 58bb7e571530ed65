"""One face for every model that can be run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from numpy.typing import NDArray

from bnctl.runtime.trace import Trace

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model


class Runner(Protocol):
    """A model that can be run on a batch."""

    @property
    def kind(self) -> Literal["onnx", "torch"]:
        """The engine that the model belongs to."""
        ...

    @property
    def precision(self) -> str:
        """The coarsest float type among its weights: what the tolerance of a comparison follows from.

        "float64", "float32", "float16" or "bfloat16".
        """
        ...

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Outputs by name, in the model's order; nested outputs are flattened ("boxes", "0.scores"), bfloat16 is
        widened.

        Raises:
            ModelError: the model does not take these inputs, or fails on them.
        """
        ...

    def observe(self, batch: Batch, layers: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """What :meth:`run` gives, and the outputs of some inner layers by name, of one pass.

        Raises:
            ModelError: as for :meth:`run`.
        """
        ...

    def trace(self, batch: Batch) -> Trace:
        """The outputs of all inner layers by name, in order of execution, with what each was computed from.

        Raises:
            ModelError: as for :meth:`run`.
        """
        ...

    def in_float64(self) -> Runner | None:
        """The same model with float64 parameters and inputs; None where the runtime cannot."""
        ...

    def snapshot(self) -> Callable[[], None]:
        """The state of the model as it is now, to be put back by a call: running it may count or cache."""
        ...

    def perturbed(self, step: float) -> Runner | None:
        """A copy in which every float parameter and buffer is `step` larger or smaller, relative to itself; None where there is none."""
        ...

    def prepared(self, batch: Batch) -> AbstractContextManager[Prepared]:
        """A call without arguments that runs the model and nothing else: inputs are converted beforehand, for timing.

        Raises:
            ModelError: as for :meth:`run`.
        """
        ...


def _nothing() -> None:
    """Inputs are as they were."""


@dataclass(frozen=True)
class Prepared:
    """Runs a model on inputs that are there.

    Args:
        run: the model, and nothing else.
        renew: to be called between runs: gives the inputs the values that they had, where the model has written into them.
    """

    run: Callable[[], object]
    renew: Callable[[], None] = _nothing

    def __call__(self) -> object:
        """Run the model."""
        return self.run()


def open_runner(model: Model, *, optimised: bool = False, threads: int = 1, device: str = "cpu") -> Runner:
    """The runner for a model, by its kind.

    Args:
        model: an opened model.
        optimised: let ONNX Runtime rewrite the graph. Off for comparisons: its own rewriting is not always exact.
        threads: of ONNX Runtime's session; torch has one setting per process, which stays as it is.
        device: "cpu" or "cuda".

    Raises:
        ModelError: the runtime refuses the model.
        UsageError: there is no such device here.
    """
    native: Any = model.native
    if model.kind == "onnx":
        from bnctl.runtime.ort import OrtRunner

        return OrtRunner(native, optimised=optimised, threads=threads, device=device, name=model.word)
    from bnctl.runtime.torch import TorchRunner

    return TorchRunner(native, device=device, name=model.word)
