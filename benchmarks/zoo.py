"""Fold real architectures with bnctl and with its peers: what is folded, what is left and why, how large the error is, how long it takes.

    python benchmarks/zoo.py                                    what is missing in zoo-results/, with the tools that are at hand
    python benchmarks/zoo.py --only 'timm:resnet*' --tool bnctl
    python benchmarks/zoo.py --python aimet=PATH --onnx FOLDER  a peer in an environment of its own; more ONNX files
    python benchmarks/zoo.py --write docs/zoo.md                the page, from the results

A result is a JSON line in zoo-results/TOOL.jsonl. What is there is not measured again: delete a file, or lines of it, to do so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from queue import Empty, Queue
from threading import Lock
from typing import Any

from zoo_tools import ONNX, PEERS, TORCH

HERE = Path(__file__).parent


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="models, by name")
    parser.add_argument("--tool", action="append", choices=sorted({*TORCH, *ONNX}), help="tools; all by default")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help="the Python that has a tool")
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help="more ONNX files")
    parser.add_argument("--results", type=Path, default=Path("zoo-results"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=300, help="time limit for a model")
    parser.add_argument("--write", type=Path, metavar="FILE", help="measure nothing: write the page")
    return parser.parse_args()


def models(folder: Path | None) -> list[str]:
    """Architectures by rule (zoo_choose.py), and the ONNX files within reach."""
    from zoo_onnx import files

    return [*(HERE / "zoo_models.txt").read_text(encoding="utf-8").split(), *(str(p) for p in files(folder))]


def measured(file: Path) -> set[str]:
    """Models that a results file has."""
    if not file.exists():
        return set()
    return {json.loads(line)["model"] for line in file.read_text(encoding="utf-8").splitlines()}


def available(tool: str, python: str) -> bool:
    """Whether that Python can import the tool."""
    package = PEERS.get(tool)
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return package is None or subprocess.run([python, "-c", find], check=False).returncode == 0


def run(tool: str, python: str, words: list[str], file: Path, jobs: int, seconds: int) -> None:
    """Measure, and append the rows as they come."""
    todo: Queue[str] = Queue()
    for word in words:
        todo.put(word)
    lock = Lock()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE.parent / "src")]).strip(os.pathsep),
        "OMP_NUM_THREADS": "1",
    }

    def work(_: int) -> None:
        command = [python, str(HERE / "zoo_worker.py"), tool, str(seconds)]
        with subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as worker:
            assert worker.stdin is not None and worker.stdout is not None
            while True:
                try:
                    word = todo.get_nowait()
                except Empty:
                    break
                started = time.perf_counter()
                worker.stdin.write(f"{word}\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    sys.exit(f"the worker for {tool} ended at {word}: run {' '.join(command)} by hand")
                with lock:
                    with file.open("a", encoding="utf-8") as stream:
                        stream.write(line)
                    print(told(json.loads(line), time.perf_counter() - started), flush=True)
            worker.stdin.close()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(min(jobs, len(words)))))


def told(row: dict[str, Any], seconds: float) -> str:
    """One line for the terminal."""
    what = row.get("crash")
    if what is None:
        what = f"{row['executed'] - row['remaining']}/{row['executed']} folded, error {row['error']:.1e}"
    return f"{row['tool']:14} {row['model'].rpartition('/')[2]:45} {what} ({seconds:.0f} s)"


def main() -> None:
    options = parse()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.write:
        from zoo_report import page

        options.write.write_text(page(options.results), encoding="utf-8")
        return
    pythons = dict(word.split("=", 1) for word in options.python)
    words = [w for w in models(options.onnx) if fnmatch(w, options.only)]
    for tool in options.tool or dict.fromkeys((*TORCH, *ONNX)):
        python = pythons.get(tool, sys.executable)
        if not available(tool, python):
            print(f"{tool:14} skipped: not installed (--python {tool}=PATH names the Python that has it)")
            continue
        file = options.results / f"{tool}.jsonl"
        done = measured(file)
        mine = [w for w in words if w not in done and tool in (ONNX if w.endswith(".onnx") else TORCH)]
        run(tool, python, mine, file, options.jobs, options.seconds)


if __name__ == "__main__":
    main()
