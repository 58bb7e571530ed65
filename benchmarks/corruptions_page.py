"""The page docs/corruptions.md, from the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from bnctl.stats.paired import paired_difference

Row = dict[str, Any]
Z = 1.959964
"""Of a two-sided interval of 95 %."""

HEAD = """# Recalibration under corruption

ResNet-20 for CIFAR-10 on images that are corrupted in a way it was not trained on, before and after `bnctl.recalibrate(model, data, prior=N)` on unlabelled
calibration images (of CIFAR-10's training set) with the same corruption: the experiment of Schneider et al. 2020, "Improving robustness against common
corruptions by covariate shift adaptation", in small. Written by `python benchmarks/corruptions.py` from measured results.

Accuracy in per cent on {samples} test images, method `exact`. Intervals are of 95 %: Wilson's for an accuracy; Tango's paired score interval for a difference
to *before*, which is the accuracy of the network as it came.

Corruptions are those of `imagecorruptions` 1.1.2 as it is. It is made for photographs, and the radius of a blur is in pixels: at 32 x 32 it is seven times as
large a part of the image as at 224 x 224, so results of the same severity elsewhere are not comparable. At severities 1, 3 and 5 `contrast` keeps 0.4, 0.2 and
0.05 of the distance to the image's own mean; `gaussian_noise` adds a standard deviation of 0.08, 0.18 and 0.38 (of a range of 1); `defocus_blur` averages over
a disk of radius 3, 6 and 10 pixels; `pixelate` reduces each side to 0.6, 0.4 and 0.25 and enlarges it again; `jpeg_compression` is of quality 25, 15 and 7.
"""

MAIN = """## Before and after

`exact` on 1,000 images, and on each of two disjoint sets of 200. Over all rows the mean goes from {before:.1f} to {after:.1f}; the interval of the difference
is above 0 in {better} of {rows} rows and below 0 in {worse}.
"""

PRIOR = """## With a prior

The old statistics count as N more images: `w = N / (N + n)`. Means over the corruptions of a severity; 16 and 200 images: means of two disjoint sets.
"""

CLEAN = """## Without corruption

Recalibration on 1,000 clean calibration images, as they are and with the augmentation of the network's training (four black pixels on each side, random crop,
flip). The statistics that the network came with are of augmented images, so those of images as they are belong to other data.
"""

AUGMENTED = """## Augmented or not

`exact` on 1,000 corrupted images as they are, and with the augmentation of training applied to them; means over the corruptions of a severity, prior 0.
"""


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    clean = next(row for row in rows if row["condition"] == "clean")
    shifted = sorted((row for row in rows if row is not clean), key=lambda row: row["condition"])
    severities = sorted({_severity(row) for row in shifted})
    first = clean["trials"]
    counts, priors = (sorted({trial[key] for trial in first}) for key in ("images", "prior"))
    parts = [
        HEAD.format(samples=f"{clean['samples']:,}"),
        MAIN.format(**_overall(shifted)),
        _table(
            ["corruption", "severity", "before", "`exact`, 1,000", "difference", "`exact`, 200"], map(_main, shifted)
        ),
        PRIOR,
        _table(
            ["severity", "images", "before", *(f"N = {prior}" for prior in priors)],
            (_priors([r for r in shifted if _severity(r) == s], s, n, priors) for s in severities for n in counts),
        ),
        AUGMENTED,
        _table(
            ["severity", "before", "as they are", "augmented"],
            (_augmented([r for r in shifted if _severity(r) == s], s) for s in severities),
        ),
        CLEAN,
        _table(["calibration images", "prior", "before", "after", "difference"], _clean(clean)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _overall(rows: list[Row]) -> dict[str, Any]:
    trials = [(row, *_found(row, 1000, 0)) for row in rows]
    found = [paired_difference(trial["lost"], trial["gained"], row["samples"]) for row, trial in trials]
    return {
        "before": mean(100 * row["before"] / row["samples"] for row in rows),
        "after": mean(_percent(row, trial) for row, trial in trials),
        "better": sum(difference.low > 0 for difference in found),
        "worse": sum(difference.high < 0 for difference in found),
        "rows": len(rows),
    }


def _main(row: Row) -> list[str]:
    (many,) = _found(row, 1000, 0)
    few = [_percent(row, trial) for trial in _found(row, 200, 0)]
    name = row["condition"].rsplit("-", 1)[0]
    return [
        name,
        str(_severity(row)),
        _accuracy(row["before"], row["samples"]),
        _accuracy(many["right"], row["samples"]),
        _difference(many, row["samples"]),
        ", ".join(f"{value:.1f}" for value in few),
    ]


def _priors(rows: list[Row], severity: int, images: int, priors: list[int]) -> list[str]:
    before = mean(100 * row["before"] / row["samples"] for row in rows)
    after = (mean(_percent(row, trial) for row in rows for trial in _found(row, images, prior)) for prior in priors)
    return [str(severity), f"{images:,}", f"{before:.1f}", *(f"{value:.1f}" for value in after)]


def _augmented(rows: list[Row], severity: int) -> list[str]:
    before = mean(100 * row["before"] / row["samples"] for row in rows)
    after = (
        mean(_percent(row, trial) for row in rows for trial in _found(row, 1000, 0, augmented))
        for augmented in (False, True)
    )
    return [str(severity), f"{before:.1f}", *(f"{value:.1f}" for value in after)]


def _clean(row: Row) -> Iterable[list[str]]:
    for trial in row["trials"]:
        if trial["images"] == 1000:
            yield [
                "augmented" if trial["augmented"] else "as they are",
                str(trial["prior"]),
                _accuracy(row["before"], row["samples"]),
                _accuracy(trial["right"], row["samples"]),
                _difference(trial, row["samples"]),
            ]


def _found(row: Row, images: int, prior: int, augmented: bool = False) -> list[Row]:
    wanted = (images, prior, augmented)
    return [trial for trial in row["trials"] if (trial["images"], trial["prior"], trial["augmented"]) == wanted]


def _severity(row: Row) -> int:
    return int(row["condition"].rsplit("-", 1)[1])


def _percent(row: Row, trial: Row) -> float:
    return 100 * trial["right"] / row["samples"]


def _accuracy(right: int, samples: int) -> str:
    """With Wilson's score interval."""
    p = right / samples
    middle = (p + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * math.sqrt(p * (1 - p) / samples + Z**2 / (4 * samples**2))
    return f"{100 * p:.1f} [{100 * (middle - half):.1f}, {100 * (middle + half):.1f}]"


def _difference(trial: Row, samples: int) -> str:
    found = paired_difference(trial["lost"], trial["gained"], samples)
    return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    line = "|".join(["---", *["--:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])
