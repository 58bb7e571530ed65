"""Starting one worker process, and telling its failures apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bnctl import errors
from bnctl.bench.spec import ProcessResult, WorkerSpec
from bnctl.bench.worker import stage_file
from bnctl.errors import BnctlError, ModelError

_TAIL_LINES = 15


def run_worker(spec: WorkerSpec) -> ProcessResult:
    """Run one task in a fresh process.

    Raises:
        ModelError: the process crashed or hung while it worked on a model: named, with the end of what it printed.
            That is an error of the run and never a verdict.
        BnctlError: what the worker itself raised, in its own class; or it failed before it came to any model.
    """
    result, log = Path(spec.result), Path(f"{spec.result}.log")
    threads = str(spec.options.threads)
    # Thread pools read these before any setting of ours could reach them.
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # -P: a file in the current folder must not shadow a module of the standard library.
    command = [sys.executable, "-P", "-m", "bnctl.bench.worker"]
    with log.open("wb") as sink:
        try:
            status = subprocess.run(
                command,
                input=spec.to_json().encode(),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=spec.options.timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise _failure(spec, log, f"did not finish within {spec.options.timeout_s:g} s") from None
    if status != 0 or not result.exists():
        raise _failure(spec, log, f"ended with {_status(status)}")
    text = result.read_text()
    error = json.loads(text).get("error")
    if error is not None:
        raise getattr(errors, error["class"])(error["message"], hint=error["hint"])
    return ProcessResult.from_json(text)


def _failure(spec: WorkerSpec, log: Path, what: str) -> BnctlError:
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    output = "\n".join(lines) or "(it printed nothing)"
    stage = stage_file(spec.result)
    if not stage.exists():
        return BnctlError(f"a bench worker {what} before it came to any model:\n{output}")
    return ModelError(
        f"a bench worker {what} while it ran {stage.read_text()}:\n{output}",
        hint="this is a crash and no measurement: run the model alone on the same inputs",
    )


def _status(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"
