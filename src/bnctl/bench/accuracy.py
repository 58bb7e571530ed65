"""Accuracy of several models over the same samples, in one pass, and how often they disagree.

Only counts are kept. Candidates are compared with the baseline sample by sample: that pairs out most of the sampling
noise (:mod:`bnctl.stats.paired`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import DataError, UsageError
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
        output: the baseline's output that is judged, by its name.
        baseline_accuracy: fraction of samples that the baseline gets right.
        candidate_accuracy: the same for the candidate.
        paired: the difference, candidate minus baseline, as a fraction, with its interval.
    """

    metric: str
    candidate: str
    output: str
    baseline_accuracy: float
    candidate_accuracy: float
    paired: PairedDifference

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``accuracy``; fractions, not percentages."""
        return {
            "metric": self.metric,
            "model": self.candidate,
            "output": self.output,
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
    """How often a candidate's top class is another than the baseline's; labels are not needed for that.

    Where one of the two holds a NaN and the other does not, that is a flip: ``argmax`` would call the NaN a class.
    """

    candidate: str
    output: str
    samples: int
    flips: int

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``agreement``."""
        return {"model": self.candidate, "output": self.output, "samples": self.samples, "flips": self.flips}


@dataclass(frozen=True)
class Accuracy:
    """What one pass over the samples found.

    Attributes:
        rows: one per candidate and metric; empty without labels.
        agreement: one per candidate; empty without class scores.
        notes: what the figures leave out, in sentences.
    """

    rows: tuple[AccuracyRow, ...] = ()
    agreement: tuple[AgreementRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Counts:
    samples: int = 0  # those that were compared
    labelled: int = 0
    classes: int = 0
    skipped: Counter[int] = field(default_factory=Counter)  # batches without class scores, by their size
    nan: Counter[int] = field(default_factory=Counter)  # samples, by model
    flips: Counter[int] = field(default_factory=Counter)
    right: Counter[tuple[int, int]] = field(default_factory=Counter)  # (k, model)
    lost: Counter[tuple[int, int]] = field(default_factory=Counter)
    gained: Counter[tuple[int, int]] = field(default_factory=Counter)


def measure_accuracy(
    names: Sequence[str], runners: Sequence[Runner], batches: Iterable[Batch], *, gated: bool = False
) -> Accuracy:
    """Top-1 and top-5 accuracy and label flips of all models; each runs each batch once.

    The baseline's first output that looks like class scores, floats of shape (N, C), is judged, and the candidates'
    of the same name, or else their first. Without labels there are only flips; top-5 needs more than five classes.
    Without an output of class scores there is neither.

    Args:
        names: of the models, the baseline first.
        runners: the models.
        batches: inputs, with labels (all of them) or without.
        gated: whether a gate rests on this: what is else a note on the choice of output, or on batches that could not
            be compared, is then an error.

    Raises:
        UsageError: gated, and several outputs could be the class scores.
        DataError: no samples, labels on some batches only or beyond the model's classes, candidates without class
            scores, or, gated, a baseline without them on some batches only, or with NaN in them.
        ModelError: a model does not take a batch.
    """
    counts = _Counts()
    notes: list[str] = []
    judged: list[str] = []  # the output of each model
    for batch in batches:
        found = [_class_scores(runner.run(batch), batch.size) for runner in runners]
        if not (found[0] and (not judged or judged[0] in found[0])):
            counts.skipped[batch.size] += 1
            continue
        if not judged:
            judged = [_judged(of_model, found[0]) for of_model in found]
            notes += _ambiguity(names, found, judged, gated)
        _count(counts, _comparable(names, [of_model.get(o) for of_model, o in zip(found, judged, strict=True)]), batch)
    if not (counts.samples or counts.skipped):
        raise DataError("no samples to measure accuracy on", hint="give --data that is not empty")
    if counts.labelled not in (0, counts.samples):
        raise DataError(f"only {counts.labelled} of {counts.samples} samples have labels", hint="label all or none")
    if not judged:
        return Accuracy()
    notes += _skipped(names[0], judged[0], counts, gated)
    if gated and counts.nan[0]:
        raise DataError(
            f"{names[0]} returned NaN for {counts.nan[0]} of {counts.samples} samples: no gate can rest on those",
            hint="look for NaN in the data and the preprocessing, and at the model with bnctl verify",
        )
    notes += [
        f"{name} returned NaN for {counts.nan[i]} of {counts.samples} samples"
        for i, name in enumerate(names)
        if counts.nan[i]
    ]
    ks = [k for k in TOP_K if counts.labelled and k < counts.classes]
    candidates = list(enumerate(names))[1:]
    return Accuracy(
        tuple(_row(counts, k, i, name, judged[0]) for k in ks for i, name in candidates),
        tuple(AgreementRow(name, judged[0], counts.samples, counts.flips[i]) for i, name in candidates),
        tuple(notes),
    )


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


def _class_scores(outputs: Mapping[str, NDArray[Any]], samples: int) -> dict[str, NDArray[Any]]:
    return {name: o for name, o in outputs.items() if is_logits(o) and len(o) == samples}


def _judged(scores: Mapping[str, Any], of_baseline: Mapping[str, Any]) -> str:
    """The output that is judged, "" where there is none."""
    named = next(iter(of_baseline))
    return named if named in scores else next(iter(scores), "")


def _ambiguity(
    names: Sequence[str], found: Sequence[Mapping[str, Any]], judged: Sequence[str], gated: bool
) -> list[str]:
    """A note for each model of which another output could be meant; a baseline's name settles it for candidates."""
    notes = []
    for i, (name, scores, output) in enumerate(zip(names, found, judged, strict=True)):
        if len(scores) < 2 or (i and output == judged[0]):
            continue
        several = f"{name}: {len(scores)} outputs look like class scores ({', '.join(scores)})"
        if gated:
            raise UsageError(
                f"{several}: no gate can rest on one of them", hint="gate on models with one output of shape (N, C)"
            )
        notes.append(f"{several}; {output} is judged, the others are not")
    return notes


def _skipped(name: str, output: str, counts: _Counts, gated: bool) -> list[str]:
    """A note on batches in which the baseline gave no class scores, though it does in others."""
    if not counts.skipped:
        return []
    sizes = " or ".join(map(str, sorted(counts.skipped)))
    problem = f"{name}: output {output} for a batch of {sizes} is not of shape (N, C)"
    without = sum(size * batches for size, batches in counts.skipped.items())
    if gated:
        raise DataError(
            f"{problem}: {without} of {counts.samples + without} samples cannot be compared",
            hint="choose a --batch-size that leaves no such batch, or keep the model from squeezing its output",
        )
    return [f"{problem}: {without} of {counts.samples + without} samples were not compared"]


def _comparable(names: Sequence[str], scores: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
    """The scores, all of one shape."""
    expected = scores[0]
    assert expected is not None
    for name, of_model in zip(names, scores, strict=True):
        if of_model is None or of_model.shape != expected.shape:
            shape = "none" if of_model is None else list(of_model.shape)
            raise DataError(
                f"{name}: class scores of shape {list(expected.shape)} expected as from {names[0]}, got {shape}",
                hint="compare classifiers of the same classes",
            )
    return [s for s in scores if s is not None]


def _count(counts: _Counts, scores: Sequence[NDArray[Any]], batch: Batch) -> None:
    counts.samples += batch.size
    counts.classes = scores[0].shape[1]
    chosen = [s.argmax(axis=1) for s in scores]
    undefined = [np.isnan(s).any(axis=1) for s in scores]
    for model in range(len(scores)):
        counts.nan[model] += int(undefined[model].sum())
        flipped = (chosen[model] != chosen[0]) | (undefined[model] != undefined[0])
        counts.flips[model] += int(flipped.sum())
    if batch.labels is not None:
        _count_hits(counts, scores, _checked(batch.labels, counts.classes))


def _checked(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"the labels of a batch reach from {labels.min()} to {labels.max()}, the models know classes 0 to {classes - 1}",
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


def _row(counts: _Counts, k: int, model: int, name: str, output: str) -> AccuracyRow:
    n = counts.labelled
    paired = paired_difference(counts.lost[k, model], counts.gained[k, model], n)
    return AccuracyRow(f"top{k}", name, output, counts.right[k, 0] / n, counts.right[k, model] / n, paired)
