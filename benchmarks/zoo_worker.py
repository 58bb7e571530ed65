"""Measure the models named on stdin with one tool; a JSON line each on stdout. Every model has a process of its own, forked when the packages are loaded.

python benchmarks/zoo_worker.py TOOL SECONDS
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from zoo_measure import measure_onnx, measure_torch
from zoo_tools import versions


def preload(tool: str) -> None:
    """Import what takes long, once."""
    import torch
    import zoo_models  # noqa: F401

    from bnctl.models.importing import import_module

    torch.set_num_threads(1)  # no threads before the fork
    import_module("torchvision")
    import_module("timm")
    if tool == "aimet":
        import_module("aimet_torch.batch_norm_fold")


def measured(tool: str, word: str) -> dict[str, Any]:
    """A row, or how it ended."""
    row: dict[str, Any] = {"tool": tool, "version": versions(tool), "python": platform.python_version(), "model": word}
    try:
        (measure_onnx if word.endswith(".onnx") else measure_torch)(tool, word, row)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        row["crash"] = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    return row


def in_a_process(tool: str, word: str, seconds: int) -> dict[str, Any]:
    """Fork, measure, and read the row; a process that is killed or runs out of time is a crash."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            Path(result.name).write_text(json.dumps(measured(tool, word)), encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        text = result.read()
    if text:
        return json.loads(text)
    number = os.waitstatus_to_exitcode(status)
    why = f"ran past {seconds} s" if number == -signal.SIGALRM else f"the process ended with {number}"
    return {"tool": tool, "model": word, "crash": why}


def main(tool: str, seconds: int) -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a tool prints goes to stderr
    if tool in {"bnctl", "torch.fx", "aimet"}:
        preload(tool)
    for line in sys.stdin:
        answers.write(json.dumps(in_a_process(tool, line.strip(), seconds)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
