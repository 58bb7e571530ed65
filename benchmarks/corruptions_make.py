"""Corrupted images for `corruptions.py`, made with `imagecorruptions` in an environment of its own.

    python -m venv corrupting && corrupting/bin/pip install imagecorruptions 'setuptools<81'
    corrupting/bin/python benchmarks/corruptions_make.py FOLDER [--data ../shared/data/cifar10_resnet20]

Writes one `CORRUPTION-SEVERITY.npz` each, with the test images as `test` and the first 1,000 calibration images as `calibration`, uint8 (N, 32, 32, 3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

CORRUPTIONS = ("contrast", "gaussian_noise", "defocus_blur", "pixelate", "jpeg_compression")
SEVERITIES = (1, 3, 5)
CALIBRATION = 1000
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_resnet20"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    parts = {"test": np.load(options.data / "test.npz")["x"]}
    parts["calibration"] = np.load(options.data / "calibration.npz")["x"][:CALIBRATION]
    for number, (name, severity) in enumerate((name, s) for name in CORRUPTIONS for s in SEVERITIES):
        np.random.seed(number)  # the package draws from numpy's global generator
        made = {part: corrupted(images, name, severity) for part, images in parts.items()}
        np.savez(options.folder / f"{name}-{severity}.npz", **made)
        print(f"{name} {severity}", flush=True)


def corrupted(images: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Every image corrupted on its own, (N, H, W, 3) uint8."""
    from imagecorruptions import corrupt

    return np.stack([corrupt(image, corruption_name=name, severity=severity) for image in images])


if __name__ == "__main__":
    main()
