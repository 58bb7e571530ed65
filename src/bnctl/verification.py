"""Whether two models compute the same function, and if not, where they part.

Both models run on the same batches. Every output is compared (:mod:`bnctl.numerics.compare`) against the tolerance
that follows from the coarsest float type of the two models. What proves nothing does not pass: no samples, and a
baseline whose outputs are all zero, NaN or empty.

Some functions magnify rounding: a sigmoid that is saturated nearly everywhere has a tiny scale and a fixed resolution, a
long softmax decoder moves by 3e-4 when its input moves by one unit in the last place. An output beyond the tolerance is
therefore measured against the baseline's own rounding noise: how far the output moves when every input is changed by a few
units in the last place, and how far it is from what the baseline gives in float64. An error within :data:`NOISE_FACTOR`
times that noise cannot be told from rounding. Where that would excuse more than :data:`DROWNED` of an output's scale, the
output proves nothing, and the layers before it must agree instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import InputError, ModelError, UsageError
from bnctl.numerics.compare import ArrayError, Flips, compare, count_flips
from bnctl.numerics.compare import tolerance as tolerance_of
from bnctl.outcome import NO_EVIDENCE, OutputCheck, Verification
from bnctl.runtime.noise import DROWNED, NOISE_ULPS, Noise, difference, rounding_noise
from bnctl.runtime.trace import Divergence, first_divergence, last_layers

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.runtime.runner import Runner

__all__ = ["OutputCheck", "Verification", "compare_layers", "compare_runners"]

Outputs = Mapping[str, NDArray[Any]]

NOISE_FACTOR = 5.0
"""An error of up to this many times the rounding noise counts as rounding: the noise is a maximum over few draws, and of two correct folds
of a RexNet one was 3.4 times as far from the model as the model from its float64 self."""


ORDER_FACTOR = 10 * NOISE_FACTOR
"""The same for the share of whole numbers that differ in a list of them."""

VARIED = "on inputs varied from the given ones"
"""Said of a failure that the given samples alone do not show."""


@dataclass
class _Progress:
    """What is known after some batches; outputs themselves are not kept."""

    limit: float
    samples: int = 0
    varied: int = 0
    checks: dict[str, OutputCheck] = field(default_factory=dict)
    flips: Flips | None = None
    failed_on: Batch | None = None
    failed_varied: bool = False

    def add(
        self,
        batch: Batch,
        baseline: Outputs,
        candidate: Outputs,
        noise_of: Callable[[], Mapping[str, Noise]],
        required: bool,
    ) -> None:
        if required:
            self.samples += batch.size
        else:
            self.varied += batch.size
        for name, a, b in _pairs(baseline, candidate):
            whole = a.dtype.kind in "iub"
            error = compare(a, b)
            equal, noise, drowned = error.within(0.0 if whole else self.limit), None, False
            if not equal and (a.shape != b.shape or error.mismatch is None):
                found = noise_of()[name]
                equal, noise = _is_rounding(a, b, found), found.moved
                size = difference(a, b) if whole and a.shape == b.shape else error.max_rel
                drowned = required and equal and size > DROWNED
            self.checks[name] = self.checks.get(name, OutputCheck(name)).with_batch(error, equal, noise, drowned)
            if self.failed_on is None and not equal:
                self.failed_on, self.failed_varied = batch, not required
            flips = count_flips(a, b, self.limit) if required else None
            if flips is not None:
                self.flips = (self.flips or Flips()) + flips


def _is_rounding(baseline: NDArray[Any], candidate: NDArray[Any], noise: Noise) -> bool:
    """Whether two arrays differ by no more than rounding could have made of the first. Where that always has another shape, nothing can be said of values."""
    if baseline.shape != candidate.shape or (noise.reshaped and not noise.compared):
        return noise.reshaped
    # In a list of detections, say, one swap moves all that come behind it.
    is_order = baseline.dtype.kind in "iub" and baseline.ndim <= 2
    return difference(baseline, candidate) <= (ORDER_FACTOR if is_order else NOISE_FACTOR) * noise.moved


def compare_runners(
    baseline: Runner,
    candidate: Runner,
    batches: Iterable[Batch],
    *,
    where_taken: Iterable[Sequence[Batch]] = (),
    layers: Collection[str] = (),
    altered: Collection[str] = (),
    tolerance: float | None = None,
    locate: bool = True,
) -> Verification:
    """Run both models on every batch and compare all their outputs.

    Outputs are matched by name where both models use the same names, else by position. A candidate that raises on a
    batch which the baseline takes has failed; a baseline that raises is an error of the call.

    Args:
        baseline: right by definition.
        candidate: to be judged.
        batches: inputs; each is used once, nothing but maxima is kept.
        where_taken: further inputs that count only where the baseline takes them, since some models are made for one batch size; of each, the first
            alternative that it takes.
        layers: inner layers whose output must be the same, see :func:`compare_layers`; looked at in the first batch of one sample that counts.
        altered: inner layers whose output the surgery changes: that they differ is no evidence.
        tolerance: largest relative error; by default it follows from the coarser float type of the two.
        locate: on failure, look for the first layer that differs (one more run of both models).

    Raises:
        ModelError: the baseline does not take a batch.
        UsageError: the tolerance is negative, infinite or not a number.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance} tells nothing apart", hint="give a number such as 1e-4, or none")
    limit = tolerance
    if limit is None:
        limit = max(tolerance_of(baseline.precision), tolerance_of(candidate.precision))
    progress, inner = _Progress(limit), _Inner(layers if baseline.kind == candidate.kind else (), limit)

    def outcome(reason: str | None, first: Divergence | None = None, note: str | None = None) -> Verification:
        checks = tuple(progress.checks.values())
        counts = progress.samples, limit, reason is None, reason
        return Verification(*counts, checks, progress.flips, first, note, varied=progress.varied)

    by_design: set[str] = set()  # outputs that hold NaN or infinity on the given inputs, such as masked scores
    for ways, required in chain((([b], True) for b in batches), ((ways, False) for ways in where_taken)):
        taken = _first_taken(baseline, ways, inner, None if required else by_design)
        if taken is None:
            continue
        batch, names, expected, before, restore = taken
        if required:
            example, by_design = batch, by_design | _infinite(expected)
        try:
            actual, after = candidate.observe(batch, names)
        except ModelError as error:
            return outcome(f"the candidate fails on inputs that the baseline takes: {error}")
        if len(expected) != len(actual):
            return outcome(f"the candidate has {len(actual)} outputs, the baseline {len(expected)}")
        noise_of = cache(partial(rounding_noise, baseline, batch, expected, restore=restore))
        so_far = replace(progress, checks=dict(progress.checks))
        progress.add(batch, expected, actual, noise_of, required)
        if progress.failed_on is batch and not required and not _is_steady(baseline, batch, expected, restore, limit):
            progress = so_far
            continue
        if names:
            inner.add(baseline, batch, before, after, restore)
        del before, after  # they are large, and would be held while the next batch runs
    reason = _reason(progress)
    drowned = any(check.drowned for check in progress.checks.values())
    if (reason == NO_EVIDENCE or (reason is None and drowned)) and locate:
        return inner.judge(outcome(*_look_inside(baseline, candidate, example, limit, altered)))
    if reason is None:
        return inner.judge(outcome(NO_EVIDENCE if drowned else None, note=_noise_note(progress)))
    if progress.failed_on is None or not locate:
        return outcome(reason)
    return outcome(reason, *_locate(baseline, candidate, progress.failed_on, limit))


_Taken = tuple["Batch", Collection[str], dict[str, NDArray[Any]], dict[str, NDArray[Any]], Callable[[], None]]


def _first_taken(baseline: Runner, ways: Sequence[Batch], inner: _Inner, by_design: set[str] | None) -> _Taken | None:
    """The first of some batches that the baseline takes, the layers to look at in it, its outputs, theirs, and what puts the baseline into the state of before;
    None where it takes none of them, and need not. What it does not take leaves no trace.

    Args:
        baseline: the model.
        ways: the batches.
        inner: says which layers.
        by_design: the outputs that may hold NaN or infinity: inputs that make others do so are too much for the model. None: the batch is given, and must be
            taken as it is.

    Raises:
        ModelError: it does not take a batch that is given.
    """
    for batch in ways:
        names, restore = inner.wanted(batch), baseline.snapshot()
        try:
            expected, before = baseline.observe(batch, names)
        except InputError:
            if by_design is None:
                raise
        else:
            if by_design is None or _infinite(expected) <= by_design:
                return batch, names, expected, before, restore
        restore()
    return None


def _infinite(outputs: Outputs) -> set[str]:
    """The outputs that hold NaN or infinity."""
    return {name for name, value in outputs.items() if value.dtype.kind == "f" and not np.isfinite(value).all()}


def _is_steady(baseline: Runner, batch: Batch, expected: Outputs, restore: Callable[[], None], limit: float) -> bool:
    """Whether the baseline gives the same outputs on a varied batch again, and its float64 self does not complain of sizes. Some kernels do not look at the
    sizes of their inputs, and read what lies behind them.
    """
    now = baseline.snapshot()
    try:
        restore()
        again = baseline.run(batch)
    except ModelError:
        return False
    finally:
        now()
    if not all(compare(a, b).within(limit) for _, a, b in _pairs(expected, again)):
        return False
    reference = baseline.in_float64()
    if reference is None:
        return True
    try:
        reference.run(batch)
    except ModelError as error:  # of a type that it asks for, it may complain, too
        return (
            re.search(r"\b(shapes?|sizes?)\b", str(error)) is None
            or re.search(r"\b(d?types?|Double|double)\b", str(error)) is not None
        )
    return True


def _pairs(a: Outputs, b: Outputs) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    if a.keys() == b.keys():
        return [(name, value, b[name]) for name, value in a.items()]
    return [(name, value, other) for (name, value), other in zip(a.items(), b.values(), strict=True)]


def _reason(progress: _Progress) -> str | None:
    if not progress.samples:
        return "no samples were compared"
    for check in progress.checks.values():
        if not check.equal:
            detail = check.mismatch or f"relative error {check.max_rel:.3g}, tolerance {progress.limit:.3g}"
            where = f" {VARIED}" if progress.failed_varied else ""
            return f"output {check.name!r} differs{where}: {detail}"
    if not any(check.informative for check in progress.checks.values()):
        return NO_EVIDENCE
    return None


LAYER_FACTOR = 10.0
"""How much more than an output an inner layer may differ, relative to its scale: layers are compared to find faults, which
are of the order of 1, and not every inner value is as well conditioned as an output."""


@dataclass
class _Inner:
    """What is known of inner layers. They are large: they are looked at once, on one sample."""

    names: Collection[str]
    limit: float
    errors: dict[str, ArrayError] = field(default_factory=dict)
    first: Divergence | None = None

    def wanted(self, batch: Batch) -> Collection[str]:
        return self.names if batch.size == 1 and not self.errors else ()

    def add(self, baseline: Runner, batch: Batch, before: Outputs, after: Outputs, restore: Callable[[], None]) -> None:
        limit = LAYER_FACTOR * self.limit
        self.errors = {name: compare(before[name], after[name]) for name in before if name in after}
        beyond = {name: before[name] for name, error in self.errors.items() if not error.within(limit)}
        noise = rounding_noise(baseline, batch, beyond, layers=True, restore=restore) if beyond else {}
        for name in beyond:
            error = self.errors[name]
            if error.mismatch is not None or not _is_rounding(before[name], after[name], noise[name]):
                self.first = Divergence(name, error.max_abs, error.max_rel, error.mismatch)
                return

    def judge(self, verification: Verification) -> Verification:
        """A verification of the outputs, with what the layers say; a failed one as it is."""
        if not verification.passed:
            return verification
        if self.first is not None:
            tolerance = LAYER_FACTOR * self.limit
            detail = self.first.mismatch or f"relative error {self.first.max_rel:.3g}, tolerance {tolerance:.3g}"
            reason = f"layer {self.first.name} differs: {detail}"
            return replace(verification, passed=False, reason=reason, first_difference=self.first)
        telling = [error for error in self.errors.values() if error.informative]
        worst = max((error.max_rel for error in self.errors.values()), default=0.0)
        return replace(verification, layers=len(telling), max_layer_error=worst)


def compare_layers(
    baseline: Runner, candidate: Runner, batch: Batch, names: Collection[str], verification: Verification
) -> Verification:
    """Compare inner layers that the surgery says it preserved, too.

    Outputs alone are weak evidence where a network forgets its input on the way: with random weights, an efficientnet gives
    the same logits for every image, and an error of 1 % in its first layer does not show. The outputs of removed layers
    must be there, unchanged, under the same names.

    Args:
        baseline: right by definition.
        candidate: to be judged, of the same kind.
        batch: one sample is enough.
        names: layers whose output must be the same.
        verification: of the outputs; a failed one is handed back as it is.
    """
    if not verification.passed or not names or baseline.kind != candidate.kind:
        return verification
    restore = baseline.snapshot()
    try:
        (_, before), (_, after) = (runner.observe(batch, names) for runner in (baseline, candidate))
    except ModelError:  # made for one batch size
        return verification
    inner = _Inner(names, verification.tolerance)
    inner.add(baseline, batch, before, after, restore)
    return inner.judge(verification)


def _look_inside(
    baseline: Runner, candidate: Runner, batch: Batch, limit: float, altered: Collection[str]
) -> tuple[str | None, Divergence | None, str | None]:
    """Reason, place and note where the outputs say nothing: the layers closest to them are compared instead, where both models have them."""
    if baseline.kind != candidate.kind:
        return NO_EVIDENCE, None, None
    outputs = baseline.run(batch).values()
    layers = last_layers(baseline.trace(batch), candidate.trace(batch), outputs, limit, altered)
    if not layers:
        return NO_EVIDENCE, None, None
    names = ", ".join(layers)
    for name, error in layers.items():
        if not error.within(limit):
            place = Divergence(name, error.max_abs, error.max_rel, error.mismatch)
            return f"the outputs say nothing, and layer {name} differs: relative error {error.max_rel:.3g}", place, None
    worst = max(error.max_rel for error in layers.values())
    return (
        None,
        None,
        f"the outputs are zero, empty, NaN, infinite or drowned in rounding here; the layers before them agree ({names}: relative error {worst:.2g})",
    )


def _noise_note(progress: _Progress) -> str | None:
    """Says so where an output passed by the allowance for rounding alone."""
    noisy = [check.name for check in progress.checks.values() if check.noise is not None]
    if not noisy:
        return None
    return (
        f"output {', '.join(noisy)}: the error is beyond the tolerance, but no larger than the baseline's own rounding: what it does when its "
        f"inputs are changed by {NOISE_ULPS} units in the last place, or against float64"
    )


def _locate(baseline: Runner, candidate: Runner, batch: Batch, limit: float) -> tuple[Divergence | None, str | None]:
    if baseline.kind != candidate.kind:
        return None, f"no common layer names: the baseline is {baseline.kind}, the candidate {candidate.kind}"
    try:
        before, after = baseline.trace(batch), candidate.trace(batch)
    except ModelError as error:
        return None, f"the layers could not be recorded: {error}"
    if not before.values.keys() & after.values.keys():
        return None, "no common layer names"
    first = first_divergence(before, after, limit)
    return (
        first,
        None if first else "all common layers that lead to the outputs agree: the difference arises after them",
    )
