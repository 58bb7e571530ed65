"""Rates from which the time of a large recalibration follows: images decoded, plain forward passes, and what recalibration takes of them.

    python benchmarks/recalibration_rates.py [--model torchvision:resnet50] [--device cpu] [--threads 1] [--images 128] [--batch-size 32]

Prints one table. docs/distributed.md says what to do with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from recalibration_models import pink_images
from torch import nn
from zoo_models import create, randomise

from bnctl.data.batches import as_batches
from bnctl.data.open import open_data
from bnctl.data.preprocess import Preprocess
from bnctl.engines.torch.recalibrate import recalibrate

HEIGHT, WIDTH, JPEGS = 375, 500, 200
QUALITY = 90
REPEATS = 3
Clock = Callable[[], float]
"""Processor time with one thread on a processor, which other work on the machine does not change; else wall time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if (options.device, options.threads) == ("cpu", 1) else time.perf_counter
    model, images = create(options.model), torch.from_numpy(pink_images(options.images, options.size))
    randomise(model, lambda: model(images[:8]))
    batches = images.split(options.batch_size)
    decoded, kilobytes = decoding(options.size)
    print(f"{options.model}, {options.device}, {options.threads} threads, batches of {options.batch_size}\n")
    print(
        f"| | images/s |\n|---|--:|\n| JPEG decoded, resized and cropped, one core ({kilobytes:.0f} kB each) | {decoded:.0f} |"
    )
    for name, rate in rates(model, batches, options.device, clock):
        print(f"| {name} | {rate:.3g} |", flush=True)


def decoding(size: int) -> tuple[float, float]:
    """JPEGs of 500 x 375 per second through `--data folder`, resized and cropped; and their mean size in kB."""
    from PIL import Image

    pixels = np.uint8(np.clip(128 + 50 * pink_images(JPEGS, WIDTH)[:, :, :HEIGHT], 0, 255)).transpose(0, 2, 3, 1)
    steps = Preprocess(resize=round(size * 256 / 224), crop=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(Path(folder) / f"{number}.jpg", quality=QUALITY)
        kilobytes = sum(f.stat().st_size for f in Path(folder).iterdir()) / JPEGS / 1e3
        data = open_data(folder, batch_size=32, preprocess=steps)
        return JPEGS / _seconds(lambda: sum(batch.size for batch in data), time.process_time), kilobytes


def rates(model: nn.Module, batches: Sequence[torch.Tensor], device: str, clock: Clock) -> Iterator[tuple[str, float]]:
    """Images per second, of whole calls; in turn with plain passes."""
    on_device = model.to(device)
    images = sum(len(batch) for batch in batches)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                on_device(batch.to(device)).sum().item()  # waits for the device

    def calls(**options: Any) -> Callable[[], object]:
        return lambda: recalibrate(model, as_batches(batches), device=device, **options)

    runs: dict[str, Callable[[], object]] = {
        "plain forward pass": plain,
        "`batch`": calls(method="batch"),
        "`exact`, in lockstep": calls(method="exact"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    plain()
    for _ in range(REPEATS):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, clock))
    yield from ((name, images / median(values)) for name, values in seconds.items())
    yield "`exact`, one pass per layer", images / _seconds(calls(method="exact", memory_bytes=0), clock)


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    started = clock()
    run()
    return clock() - started


if __name__ == "__main__":
    main()
