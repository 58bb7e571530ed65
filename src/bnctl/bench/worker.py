"""The worker process of a latency bench: ``python -m bnctl.bench.worker``, its task as JSON on standard input.

The result goes to a file, not to standard output: models print. A second file says which model is being worked on, so
that a crash, even of the interpreter, can be put down to a model.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bnctl.bench.spec import BenchModel, ProcessResult, Turns, WorkerSpec
from bnctl.bench.timing import Schedule, time_in_turns
from bnctl.errors import BnctlError

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.runtime.runner import Runner


def stage_file(result: str) -> Path:
    """Where a worker says which model it works on."""
    return Path(f"{result}.stage")


def main() -> None:
    """Do the task on standard input. An error of ours becomes the result; anything else is a crash."""
    spec = WorkerSpec.from_json(sys.stdin.read())
    try:
        text = measure(spec).to_json()
    except BnctlError as error:
        described = {"class": type(error).__name__, "message": error.message, "hint": error.hint}
        text = json.dumps({"error": described})
    Path(spec.result).write_text(text)


def measure(spec: WorkerSpec) -> ProcessResult:
    """Load all models, the baseline twice, and time them in turns.

    Where there are ONNX models, first with the runtime's optimisations on, then with them off.

    Raises:
        BnctlError: a model cannot be loaded or does not take the inputs.
    """
    from bnctl.data.batches import Batch

    args, kwargs = pickle.loads(Path(spec.inputs).read_bytes())
    batch = Batch(args=args, kwargs=kwargs, labels=None)
    baseline, *candidates = spec.models
    models = [(asked, _load(spec, asked)) for asked in (baseline, baseline, *candidates)]
    rng = random.Random(spec.seed)
    kinds = tuple(model.kind for _, model in models)
    modes = (True, False) if "onnx" in kinds else (True,)
    turns = tuple(Turns(mode, kinds[1:], _time(spec, models, batch, mode, rng)) for mode in modes)
    return ProcessResult(turns)


def _load(spec: WorkerSpec, asked: BenchModel) -> Model:
    stage_file(spec.result).write_text(asked.word)
    model = asked.open()
    if model.kind == "torch":
        import torch

        torch.set_num_threads(spec.options.threads)
    return model


def _time(
    spec: WorkerSpec, models: list[tuple[BenchModel, Model]], batch: Batch, optimised: bool, rng: random.Random
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    from bnctl.runtime import open_runner

    options = spec.options
    schedule = Schedule(int(options.block_ms * 1e6), options.rounds, int(options.process_s * 1e9))
    with ExitStack() as stack:
        calls = []
        for asked, model in models:
            stage_file(spec.result).write_text(asked.word)
            runner: Runner = open_runner(model, optimised=optimised, threads=options.threads, device=options.device)
            call = stack.enter_context(runner.prepared(batch))
            call()
            call.renew()
            calls.append(call)
        stage_file(spec.result).write_text(" or ".join(asked.word for asked in spec.models))
        return time_in_turns(calls, schedule, rng)


if __name__ == "__main__":
    main()
