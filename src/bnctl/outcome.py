"""What a comparison of two models found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bnctl.numerics.compare import ArrayError, Flips
from bnctl.runtime.trace import Divergence

NO_EVIDENCE = "every output of the baseline is zero, NaN, infinite, empty, or drowned in rounding: agreement proves nothing; use other inputs"


@dataclass(frozen=True)
class OutputCheck:
    """One output over all batches.

    Attributes:
        name: of the output, in the baseline.
        max_abs: largest error over the batches; inf where two arrays could not be compared.
        max_rel: largest relative error over the batches.
        mismatch: the first reason why two arrays could not be compared, or None.
        informative: whether the baseline gave a finite value other than zero in any batch.
        equal: within the limit in every batch. Integers and booleans must be equal.
        noise: the baseline's own rounding noise, absolute, where the limit alone was not met.
        drowned: rounding noise is so large against the output's scale that agreement says nothing.
    """

    name: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    mismatch: str | None = None
    informative: bool = False
    equal: bool = True
    noise: float | None = None
    drowned: bool = False

    def with_batch(self, error: ArrayError, equal: bool, noise: float | None, drowned: bool) -> OutputCheck:
        """The check with one more batch."""
        return OutputCheck(
            self.name,
            max(self.max_abs, error.max_abs),
            max(self.max_rel, error.max_rel),
            self.mismatch or error.mismatch,
            self.informative or error.informative,
            self.equal and equal,
            self.noise if noise is None else max(noise, self.noise or 0.0),
            self.drowned or drowned,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite error is None, with the mismatch beside it."""
        return {
            "name": self.name,
            "max_abs_error": _finite(self.max_abs),
            "max_rel_error": _finite(self.max_rel),
            "mismatch": self.mismatch,
            "informative": self.informative,
            "rounding_noise": self.noise,
            "passed": self.equal,
        }


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing a candidate with its baseline.

    Attributes:
        samples: samples compared, of those given.
        tolerance: the relative error that still counts as equal.
        passed: whether the two compute the same function, as far as the samples show.
        reason: why not, in one sentence; None if passed.
        outputs: one check per output.
        flips: rows of logits whose argmax differs; None if no output looks like logits.
        first_difference: the layer where the two part, where that was asked for and found.
        note: why no such layer is given, or what a reader should know of a pass; None if nothing.
        layers: inner layers that were compared too.
        max_layer_error: their largest relative error.
        varied: samples compared that were made from those given: of other values, in batches of other sizes. Flips are not counted on these.
    """

    samples: int
    tolerance: float
    passed: bool
    reason: str | None
    outputs: tuple[OutputCheck, ...] = ()
    flips: Flips | None = None
    first_difference: Divergence | None = None
    note: str | None = None
    layers: int = 0
    max_layer_error: float = 0.0
    varied: int = 0

    @property
    def inconclusive(self) -> bool:
        """Nothing was found wrong, and nothing was proved either."""
        return self.reason == NO_EVIDENCE

    @property
    def max_abs_error(self) -> float:
        """Largest absolute error of any output; inf where one could not be compared."""
        return max((output.max_abs for output in self.outputs), default=math.inf)

    @property
    def max_rel_error(self) -> float:
        """Largest error of any output relative to its root mean square; inf where one could not be compared."""
        return max((output.max_rel for output in self.outputs), default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """The report's ``verification``; errors that are not finite are None."""
        first = self.first_difference
        return {
            "samples": self.samples,
            "varied_samples": self.varied,
            "max_abs_error": _finite(self.max_abs_error),
            "max_rel_error": _finite(self.max_rel_error),
            "tolerance": self.tolerance,
            "passed": self.passed,
            "reason": self.reason,
            "outputs": [output.to_dict() for output in self.outputs],
            "label_flips": None if self.flips is None else self.flips.flipped,
            "near_ties": None if self.flips is None else self.flips.near_ties,
            "first_difference": None
            if first is None
            else {
                "layer": first.name,
                "max_abs_error": _finite(first.max_abs),
                "max_rel_error": _finite(first.max_rel),
                "mismatch": first.mismatch,
            },
            "layers": self.layers,
            "max_layer_error": self.max_layer_error,
            "note": self.note,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
