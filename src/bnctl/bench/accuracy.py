"""Accuracy of several models over the same samples, in one pass, and how often they disagree.

Only counts are kept. Candidates are compared with the baseline sample by sample: that pairs out most of the sampling
noise (:mod:`bnctl.stats.paired`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import DataError
from bnctl.numerics.compare import is_logits
from bnctl.stats.paired import PairedDifference, paired_difference

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.runtime.runner import Runner

TOP_K = (1, 5)


@dataclass(frozen=True)
class AccuracyRow:
    """One candidate against the baseline, by one metric.

    Attributes:
        metric: "top1" or "top5".
        candidate: the candidate's word.
        baseline_accuracy: fraction of samples that the baseline gets right.
        candidate_accuracy: the same for the candidate.
        paired: the difference, candidate minus baseline, as a fraction, with its interval.
    """

    metric: str
    candidate: str
    baseline_accuracy: float
    candidate_accuracy: float
    paired: PairedDifference

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``accuracy``; fractions, not percentages."""
        return {
            "metric": self.metric,
            "model": self.candidate,
            "samples": self.paired.samples,
            "baseline": self.baseline_accuracy,
            "candidate": self.candidate_accuracy,
            "difference": self.paired.difference,
            "ci95": [self.paired.low, self.paired.high],
            "discordant": self.paired.lost + self.paired.gained,
            "lost": self.paired.lost,
            "gained": self.paired.gained,
            "p_value": self.paired.p_value,
        }


@dataclass(frozen=True)
class AgreementRow:
    """How often a candidate's top class is another than the baseline's; labels are not needed for that."""

    candidate: str
    samples: int
    flips: int

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``agreement``."""
        return {"model": self.candidate, "samples": self.samples, "flips": self.flips}


@dataclass
class _Counts:
    samples: int = 0
    labelled: int = 0
    classes: int = 0
    flips: Counter[int] = field(default_factory=Counter)
    right: Counter[tuple[int, int]] = field(default_factory=Counter)  # (k, model)
    lost: Counter[tuple[int, int]] = field(default_factory=Counter)
    gained: Counter[tuple[int, int]] = field(default_factory=Counter)


def measure_accuracy(
    names: Sequence[str], runners: Sequence[Runner], batches: Iterable[Batch]
) -> tuple[tuple[AccuracyRow, ...], tuple[AgreementRow, ...]]:
    """Top-1 and top-5 accuracy and label flips of all models; each runs each batch once.

    The first output that looks like class scores, floats of shape (N, C), is judged. Without labels there are only
    flips; top-5 needs more than five classes. Without an output of class scores there is neither.

    Args:
        names: of the models, the baseline first.
        runners: the models.
        batches: inputs, with labels (all of them) or without.

    Raises:
        DataError: no samples, labels on some batches only or beyond the model's classes, or candidates without class
            scores.
        ModelError: a model does not take a batch.
    """
    counts = _Counts()
    for batch in batches:
        scores = list(_scores(names, runners, batch))
        counts.samples += batch.size
        if not scores:
            continue
        counts.classes = scores[0].shape[1]
        chosen = [s.argmax(axis=1) for s in scores]
        for model in range(1, len(scores)):
            counts.flips[model] += int(np.count_nonzero(chosen[model] != chosen[0]))
        if batch.labels is not None:
            _count_hits(counts, scores, _checked(batch.labels, counts.classes))
    if not counts.samples:
        raise DataError("no samples to measure accuracy on", hint="give --data that is not empty")
    if counts.labelled not in (0, counts.samples):
        raise DataError(f"only {counts.labelled} of {counts.samples} samples have labels", hint="label all or none")
    if not counts.classes:
        return (), ()
    agreement = tuple(AgreementRow(name, counts.samples, counts.flips[i]) for i, name in enumerate(names) if i)
    ks = [k for k in TOP_K if counts.labelled and k < counts.classes]
    return tuple(_row(counts, k, i, name) for k in ks for i, name in enumerate(names) if i), agreement


def hits(scores: NDArray[Any], labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether the label is among the k classes of the highest score; among equal scores the lower index comes first.

    For k = 1 that is ``argmax``. A row with a NaN is never right.

    Args:
        scores: (N, C).
        labels: (N,), in [0, C).
        k: at least 1.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    right: NDArray[np.bool_] = (rank < k) & ~np.isnan(scores).any(axis=1)
    return right


def _scores(names: Sequence[str], runners: Sequence[Runner], batch: Batch) -> Iterator[NDArray[Any]]:
    """Class scores of every model, or of none."""
    found = []
    for runner in runners:
        outputs = runner.run(batch).values()
        found.append(next((o for o in outputs if is_logits(o) and len(o) == batch.size), None))
    if found[0] is None:
        return
    for name, scores in zip(names, found, strict=True):
        if scores is None or scores.shape != found[0].shape:
            shape = "none" if scores is None else list(scores.shape)
            raise DataError(
                f"{name}: class scores of shape {list(found[0].shape)} expected as from {names[0]}, got {shape}",
                hint="compare classifiers of the same classes",
            )
        yield scores


def _checked(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels reach from {labels.min()} to {labels.max()}, the models know classes 0 to {classes - 1}",
            hint="labels count from 0, in the order of the model's classes",
        )
    return labels.astype(np.int64)


def _count_hits(counts: _Counts, scores: Sequence[NDArray[Any]], labels: NDArray[np.int64]) -> None:
    counts.labelled += len(labels)
    for k in TOP_K:
        right = [hits(s, labels, k) for s in scores]
        for model, of_model in enumerate(right):
            counts.right[k, model] += int(of_model.sum())
            counts.lost[k, model] += int((right[0] & ~of_model).sum())
            counts.gained[k, model] += int((of_model & ~right[0]).sum())


def _row(counts: _Counts, k: int, model: int, name: str) -> AccuracyRow:
    n = counts.labelled
    paired = paired_difference(counts.lost[k, model], counts.gained[k, model], n)
    return AccuracyRow(f"top{k}", name, counts.right[k, 0] / n, counts.right[k, model] / n, paired)
