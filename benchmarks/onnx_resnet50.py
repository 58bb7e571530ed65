"""Folding a 100 MB ONNX file as a command, beside onnxslim and plain load and save: wall time, processor time, peak memory. Runs are interleaved.

python benchmarks/onnx_resnet50.py r50.onnx [--runs 5] [--onnxslim path/to/onnxslim]

The file: bnctl export torchvision.models:resnet50 --keep-bn --input 2x3x224x224 -o r50.onnx
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Of one process with its children."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str]) -> Cost:
    """Run a command once. Its modules are compiled once for all runs, as they are wherever Python may write them.

    Raises:
        RuntimeError: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def commands(model: str, folder: Path, onnxslim: str | None) -> dict[str, list[str]]:
    """What is compared, by name."""
    plain = f"import onnx_ir as ir; ir.save(ir.load({model!r}), {str(folder / 'plain.onnx')!r})"
    fold = [sys.executable, "-m", "bnctl", "fold", model, "-o", str(folder / "folded.onnx"), "--force", "--quiet"]
    found = {
        "onnx_ir load and save": [sys.executable, "-c", plain],
        "bnctl fold --no-verify": [*fold, "--no-verify"],
        "bnctl fold": fold,
    }
    if onnxslim is None:
        print("onnxslim is not installed: skipped", file=sys.stderr)
    else:
        found["onnxslim (does not verify)"] = [onnxslim, model, str(folder / "slim.onnx")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--onnxslim", default=shutil.which("onnxslim"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = commands(given.model, Path(folder), given.onnxslim)
        costs: dict[str, list[Cost]] = {name: [] for name in compared}
        for _ in range(given.runs + 1):
            for name, command in compared.items():
                costs[name].append(measure(command))
    print(
        f"| command | wall, s | processor, s | peak memory, MB |  (medians of {given.runs}; the first run does not count)"
    )
    print("|---|---|---|---|")
    for name, runs in costs.items():
        wall, cpu, peak = (statistics.median(getattr(c, k) for c in runs[1:]) for k in ("wall_s", "cpu_s", "peak_mb"))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
