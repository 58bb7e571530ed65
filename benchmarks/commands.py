"""Whole processes, medians of five: what a user waits for.

python benchmarks/commands.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx

RUNS = 5
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Modules are compiled once for all runs, as they are wherever Python may write them."""


def seconds(command: list[str]) -> float:
    """Median wall time of a command, after one run that does not count."""
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    bnctl = [sys.executable, "-m", "bnctl"]
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx")
        big, out = str(Path(folder) / "big.onnx"), str(Path(folder) / "out.onnx")
        materialise = f"import benchmarks_model; benchmarks_model.write({model!r}, {big!r})"
        subprocess.run([sys.executable, "-c", materialise], check=True, cwd=Path(__file__).parent)
        plain = f"import onnx_ir as ir; ir.save(ir.load({big!r}), {out!r})"
        cases = {
            "bnctl --help": [*bnctl, "--help"],
            "load and save with onnx-ir, 100 MB ResNet-50": [sys.executable, "-c", plain],
            "bnctl fold --no-verify, the same": [*bnctl, "fold", big, "-o", out, "--force", "--no-verify"],
            "bnctl fold with verification, the same": [*bnctl, "fold", big, "-o", out, "--force"],
        }
        print("| command | median of 5, seconds |")
        print("|---|---|")
        for name, command in cases.items():
            print(f"| {name} | {seconds(command):.2f} |", flush=True)


if __name__ == "__main__":
    main()
