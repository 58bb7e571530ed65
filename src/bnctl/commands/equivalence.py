"""Before and after: the check that every surgery ends in."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from bnctl.data.resize import other_batch_sizes, resized
from bnctl.errors import EquivalenceError
from bnctl.runtime import open_runner
from bnctl.verification import Verification, compare_layers, compare_runners

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model


def check_equivalence(
    before: Model,
    after: Model,
    example: Batch,
    *,
    layers: Collection[str] = (),
    tolerance: float | None = None,
    device: str = "cpu",
) -> Verification:
    """Run both models on the example and on batches of other sizes (where the model takes them), with runtime optimisations off.

    Args:
        before: right by definition.
        after: the model after surgery.
        example: inputs.
        layers: inner layers whose outputs the surgery preserves, to be compared too, on one sample.
        tolerance: largest relative error that counts as equal; by default it follows from the dtype.
        device: "cpu" or "cuda".
    """
    baseline, candidate = open_runner(before, device=device), open_runner(after, device=device)
    others = other_batch_sizes(example)
    verification = compare_runners(baseline, candidate, [example], where_taken=others, tolerance=tolerance)
    return compare_layers(baseline, candidate, resized(example, 1), layers, verification)


def require(verification: Verification, command: str, word: str) -> None:
    """Refuse a surgery that changed the function.

    Raises:
        EquivalenceError: naming the output, the error and the layer where the two part.
    """
    if verification.passed:
        return
    first = verification.first_difference
    where = f"; they part at {first.name}" if first is not None else ""
    raise EquivalenceError(
        f"{command} of {word} does not preserve the function: {verification.reason}{where}. Nothing was written.",
        hint="exclude the layer with --skip, or try other inputs with --data; please report the model",
        verification=verification.to_dict(),
    )
