"""ResNet-20 on corrupted CIFAR-10, before and after recalibration on unlabelled images with the same corruption.

    python benchmarks/corruptions.py FOLDER [--results FILE] [--write docs/corruptions.md]

FOLDER holds what `corruptions_make.py` wrote. Goes on where the results end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corruptions_page import page
from recalibration_models import CIFAR, cifar_input, resnet20
from torch import nn

import bnctl

BATCH = 25
PRIORS = (0, 16, 64, 256)
DRAWS = {16: 2, 200: 2, 1000: 1}
"""How many disjoint sets of so many calibration images are tried."""


@dataclass(frozen=True)
class Trial:
    """One recalibration: on so many images from this one on, with the weight of the old statistics in images."""

    images: int
    draw: int
    prior: int
    augmented: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("corruptions-results.jsonl"))
    parser.add_argument("--write", type=Path, help="write the page from the results")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(page(_read(options.results)), encoding="utf-8")
        return
    known = {row["condition"] for row in _read(options.results)}
    labels = np.load(CIFAR / "test.npz")["y"]
    for condition, test, calibration in _conditions(options.folder):
        if condition not in known:
            row = {"condition": condition, **measured(test, labels, calibration)}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(condition, row["before"], [t["right"] for t in row["trials"]], flush=True)


def measured(test: np.ndarray, labels: np.ndarray, calibration: np.ndarray) -> dict[str, Any]:
    """Test images that are recognised before, and after each trial; those that were lost and gained."""
    x = cifar_input(test)
    before = recognised(resnet20(), x, labels)
    trials = []
    for trial in _trials():
        start = trial.draw * trial.images
        images = calibration[start : start + trial.images]
        if trial.augmented:
            images = crop_and_flip(images, np.random.default_rng(0))
        data = list(cifar_input(images).split(BATCH))
        after = recognised(bnctl.recalibrate(resnet20(), data, prior=trial.prior).model, x, labels)
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        trials.append({**asdict(trial), "right": int(after.sum()), "lost": lost, "gained": gained})
    return {"before": int(before.sum()), "samples": len(labels), "trials": trials}


@torch.no_grad()
def recognised(model: nn.Module, x: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Whether the class with the highest score is the right one, (N,)."""
    return np.concatenate([model(part).argmax(1).numpy() for part in x.split(BATCH)]) == labels


def crop_and_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As the network was trained: four black pixels on each side, a random crop, and a flip of every second image."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    size = images.shape[1]
    made = []
    for image in padded:
        top, left = rng.integers(0, 9, 2)
        crop = image[top : top + size, left : left + size]
        made.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(made)


def _trials() -> list[Trial]:
    plain = [Trial(n, draw, prior) for n, draws in DRAWS.items() for draw in range(draws) for prior in PRIORS]
    return [*plain, Trial(1000, 0, 0, augmented=True)]


def _conditions(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, test images and calibration images, clean ones first."""
    yield "clean", np.load(CIFAR / "test.npz")["x"], np.load(CIFAR / "calibration.npz")["x"][:1000]
    for file in sorted(folder.glob("*.npz")):
        arrays = np.load(file)
        yield file.stem, arrays["test"], arrays["calibration"]


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    main()
