"""The methods of recalibration, and what of it is possible on any engine."""

from __future__ import annotations

import math
from typing import Literal, get_args

from bnctl.errors import DataError, ModelError, UsageError

Method = Literal["exact", "batch", "ema"]


def check_method(method: str, prior: float) -> None:
    """Refuse what no engine can do.

    Raises:
        UsageError: there is no such method, or the prior is off.
    """
    if method not in get_args(Method):
        raise UsageError(
            f"no such method of recalibration: {method!r}", hint=f"the methods are {', '.join(get_args(Method))}"
        )
    if not (math.isfinite(prior) and prior >= 0):
        raise UsageError(f"the prior is {prior}", hint="it is a number of samples, 0 or more")
    if prior and method == "ema":
        raise UsageError(
            "a moving average has no prior: it starts from the old statistics", hint="use the method exact or batch"
        )


def without_sites(name: str, also: str = "") -> ModelError:
    """A model has nothing to recalibrate."""
    return ModelError(
        f"{name} has no normalisation with running statistics{also}",
        hint="if it was folded, recalibrate the model from before; else insert normalisation first (bnctl insert)",
    )


def one_value(batch: int, site: str) -> DataError:
    """A batch gives a site a single value per channel, from which normalisation by its own statistics leaves nothing."""
    return DataError(
        f"batch {batch}: {site} sees one value per channel, which has no variance",
        hint="use the exact method, which pools all batches, or a larger batch size",
    )


def not_finite(batch: int, site: str) -> DataError:
    """What comes to a site is not finite, though the batch is."""
    return DataError(
        f"batch {batch}: the input of {site} holds NaN or infinity",
        hint="the batch itself is finite: an operator before this layer overflows; try float32, or check the preprocessing",
    )


class NoSamplesError(DataError):
    """A pass over the data had none."""


def check_pass(samples: int, before: int | None, *, skipped: bool = False) -> None:
    """Refuse data that change from pass to pass, or that are none.

    Args:
        samples: of this pass.
        before: of earlier passes; None where this is the first.
        skipped: batches were left out.

    Raises:
        NoSamplesError: there are none.
        DataError: there are not as many as last time.
    """
    if before is None:
        if not samples and skipped:
            raise NoSamplesError(
                "every batch holds NaN or infinity", hint="check the preprocessing: nothing is left to recalibrate on"
            )
        if not samples:
            raise NoSamplesError(
                "the data hold no batch", hint="check the data; a generator can be gone through only once"
            )
    elif samples != before:
        raise DataError(
            f"the data held {before} samples in the first pass and {samples} in a later one",
            hint="give something that can be iterated again with the same result, such as a list or a DataLoader",
        )


def broken_before(site: str) -> ModelError:
    """Old statistics that cannot be mixed in."""
    return ModelError(
        f"{site}: its old statistics hold NaN, infinity or a negative variance, and a prior would mix them in",
        hint="leave --prior out: new statistics from the data alone do not need the old ones",
    )


def does_not_fit(site: str, dtype: str) -> ModelError:
    """New statistics are too large for the type in which the model keeps them."""
    return ModelError(
        f"{site}: the new statistics do not fit {dtype}",
        hint="keep the normalisation layers in float32, or look for an exploding activation before them",
    )
