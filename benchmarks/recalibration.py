"""Recalibration by bnctl and its peers: error against float64, cost as a multiple of a plain forward pass, peak memory, and what goes wrong.

    python benchmarks/recalibration.py [--only NAME] [--results FILE] [--write docs/recalibration-peers.md]

Goes on where the results end. Peers are used where they are installed: `pip install fvcore aimet-torch`, in an environment of their own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from recalibration_models import CASES, PHOTOGRAPHS, Case, images_of, model_of
from recalibration_page import page
from recalibration_peers import METHODS, installed, versions
from recalibration_traps import TRAPS
from recalibration_truth import error, settled
from torch import nn

from bnctl.cli.heap import keep_freed_memory

SMALL = 2
REPEATS = 3
KEPT, GIVEN_BACK = "kept", "given back"
"""What becomes of freed memory: kept, as the command has it; given back to the system, as glibc does by default."""

PLAIN_AGAIN = "plain again"
"""A control: a second plain pass, measured like a method. What it differs from 1 by is noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of the name of the network")
    parser.add_argument("--results", type=Path, default=Path("recalibration-results.jsonl"))
    parser.add_argument("--write", type=Path, help="write the page from the results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_worker(*options.worker)))
        return
    if options.write:
        options.write.write_text(page(_read(options.results)), encoding="utf-8")
        return
    for words in _jobs(options.only):
        if any(row["job"] == words for row in _read(options.results)):
            continue
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, __file__, "--worker", *words], stdout=subprocess.PIPE, text=True, check=True
        )
        row = {"job": words, **json.loads(ended.stdout.splitlines()[-1])}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.perf_counter() - started:6.1f} s  {' '.join(words)}", flush=True)


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _jobs(only: str) -> list[list[str]]:
    """Each runs in a process of its own. A cost: network, batch size, threads, what becomes of freed memory; an error: network, batch size; memory: network,
    batch size, method; float32: the error of the naive procedure in float32, below which none can be.

    What other work on the machine would disturb comes early.
    """
    cases = [case for case in CASES if only.lower() in case.name.lower()]
    large = [case for case in PHOTOGRAPHS if only.lower() in case.name.lower()]

    def costs(cases: Sequence[Case], threads: int, freed: str) -> list[list[str]]:
        return [["cost", case.name, str(case.batch), str(threads), freed] for case in cases]

    small = [["cost", case.name, str(SMALL), "1", GIVEN_BACK] for case in cases]
    errors = [["error", case.name, str(size)] for case in cases for size in (case.batch, SMALL)]
    memory = [["memory", case.name, str(case.batch), method] for case in cases for method in installed()]
    floor = [["float32", case.name] for case in cases]
    by_cost = [*costs(large, 1, KEPT), *costs(large, 1, GIVEN_BACK), *costs(cases, 1, GIVEN_BACK), *small]
    return [*by_cost, *costs(cases, 2, GIVEN_BACK), ["traps"], *floor, *errors, *memory]


def _worker(kind: str, *words: str) -> dict[str, Any]:
    if kind == "traps":
        torch.manual_seed(0)
        return {
            "versions": versions(),
            "traps": {name: {m: check(METHODS[m]) for m in installed()} for name, check in TRAPS.items()},
        }
    case = next(c for c in (*CASES, *PHOTOGRAPHS) if c.name == words[0])
    model, images = model_of(case), images_of(case)
    if kind == "float32":
        return {"error": error(settled(model, images, torch.float32), settled(model, images))}
    batches = images.split(int(words[1]))
    if kind == "memory":
        return {"peak_bytes": peak_memory(model, batches, words[2])}
    if kind == "error":
        return {"errors": errors(model, batches, settled(model, images))}
    torch.set_num_threads(int(words[2]))
    if words[3] == KEPT:
        keep_freed_memory()
    return {"seconds": seconds(model, batches, REPEATS)}


def errors(model: nn.Module, batches: Sequence[torch.Tensor], truth: nn.Module) -> dict[str, Any]:
    """The error of each method, and of the statistics from before."""
    results = {name: METHODS[name](copy.deepcopy(model), batches) for name in installed()}
    return {name: error(result, truth) for name, result in ({"before": model} | results).items()}


def seconds(model: nn.Module, batches: Sequence[torch.Tensor], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each method, wall and processor, in each repeat; all in turn, in random order, and once before for warming up."""
    runs: dict[str, Callable[[nn.Module], Any]] = {name: lambda m: plain(m, batches) for name in ("plain", PLAIN_AGAIN)}
    runs |= {name: lambda m, f=METHODS[name]: f(m, batches) for name in installed()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for repeat in range(repeats + 1):
        random.Random(repeat).shuffle(order)
        for name in order:
            work = copy.deepcopy(model)
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            runs[name](work)
            spent = time.perf_counter() - wall, time.process_time() - processor
            if repeat:
                found[name].append(spent)
    return found


def plain(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """A forward pass in inference over all batches."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def peak_memory(model: nn.Module, batches: Sequence[torch.Tensor], method: str) -> dict[str, int]:
    """Peak resident memory of this process in a plain pass over the data, and in the method."""
    METHODS[method](nn.Sequential(nn.BatchNorm2d(3)).eval(), [torch.randn(4, 3, 8, 8)] * 2)  # what it imports
    plain(model, batches[:1])
    return {
        "plain": _peak_bytes(lambda: plain(model, batches)),
        "method": _peak_bytes(lambda: METHODS[method](model, batches)),
    }


def _peak_bytes(run: Callable[[], object]) -> int:
    """Of this process while it runs: Linux forgets the peak from before when 5 is written to `clear_refs`."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert peak
    return int(peak[1]) * 1024


if __name__ == "__main__":
    main()
