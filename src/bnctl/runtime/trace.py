"""What the layers of one execution computed, and where two executions part for good."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.numerics.compare import ArrayError, compare


@dataclass(frozen=True)
class Trace:
    """The inner values of one execution.

    Attributes:
        values: layer name to its output, in order of execution.
        parents: layer name to the names that its value was computed from. Names without a value may appear: they are
            looked through.
        outputs: the names that the model's outputs were computed from.
    """

    values: dict[str, NDArray[Any]]
    parents: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Divergence:
    """The layer where two executions part.

    Attributes:
        name: the layer, by the name that both models share.
        max_abs: error of its output.
        max_rel: the same, relative to the baseline's root mean square.
        mismatch: why the outputs cannot be compared, or None.
    """

    name: str
    max_abs: float
    max_rel: float
    mismatch: str | None


def first_divergence(baseline: Trace, candidate: Trace, limit: float) -> Divergence | None:
    """The earliest common layer from which a difference persists up to the outputs; None if there is none.

    A fold changes inner values legitimately: a conv absorbs the factor of the BN behind it, and everything after that
    BN agrees again. So a layer counts only if it differs *and* reaches an output of the candidate through layers that
    all differ. Among those, the first one executed is returned. Where a fault sits inside such a legitimate change,
    the start of the change is what is found.

    Args:
        baseline: execution of the model that is right by definition.
        candidate: execution of the other model, of the same kind, on the same batch.
        limit: relative error that still counts as equal.
    """
    common = {name for name in baseline.values if name in candidate.values}
    errors = {name: compare(baseline.values[name], candidate.values[name]) for name in common}
    persistent: set[str] = set()
    frontier = _nearest(candidate.outputs, candidate.parents, common)
    while frontier:
        differing = {name for name in frontier if name not in persistent and not errors[name].within(limit)}
        persistent |= differing
        readers_of = (parent for name in differing for parent in candidate.parents[name])
        frontier = _nearest(readers_of, candidate.parents, common)
    first = next((name for name in baseline.values if name in persistent), None)
    if first is None:
        return None
    return Divergence(first, errors[first].max_abs, errors[first].max_rel, errors[first].mismatch)


def last_layers(
    baseline: Trace,
    candidate: Trace,
    outputs: Iterable[NDArray[Any]],
    limit: float,
    altered: Collection[str] = (),
) -> dict[str, ArrayError]:
    """Errors of the common layers closest to the outputs, of those that say anything: empty and all-zero values are looked through.

    They stand in for outputs that are empty, such as those of a detector that finds nothing.

    Args:
        baseline: execution of the model that is right by definition.
        candidate: execution of the other model, of the same kind, on the same batch.
        outputs: the baseline's outputs; a layer that is one of them is looked through.
        limit: relative error that still counts as equal.
        altered: layers that need not agree; one that does not is looked through, too.
    """
    given = [value for value in outputs if value.size]
    common = {
        name
        for name in baseline.values.keys() & candidate.values.keys()
        if not any(np.array_equal(baseline.values[name], value, equal_nan=value.dtype.kind == "f") for value in given)
    }
    errors = {name: compare(baseline.values[name], candidate.values[name]) for name in common}
    free = {name for name in common if name.partition("#")[0] in altered and not errors[name].within(limit)}
    telling = {name for name in common - free if errors[name].informative}
    return {name: errors[name] for name in sorted(_nearest(candidate.outputs, candidate.parents, telling))}


def _nearest(names: Iterable[str], parents: dict[str, tuple[str, ...]], common: set[str]) -> set[str]:
    """The names themselves where they are common layers, else their closest ancestors that are."""
    found: set[str] = set()
    seen: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name in common:
            found.add(name)
        elif name not in seen:
            seen.add(name)
            stack.extend(parents.get(name, ()))
    return found
