"""`bnctl verify`: do two models compute the same?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from bnctl.commands.setup import Setup
from bnctl.errors import ExitCode, InputError
from bnctl.report import Artifact, Report

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.runtime import Runner
    from bnctl.verification import Verification


def run_verify(baseline: str, candidate: str, setup: Setup, *, tolerance: float | None) -> Report:
    """Compare two models on data, or on the example. A failure is a result: exit code 1.

    They are compared on other batch sizes, too, unless the candidate says that it takes one only. And where the inputs are drawn at random, on other values and
    choices (a flag, a number, a mask), and on other sizes of the other axes, as far as both models take those: an export may have fixed them on purpose, and
    then the report says so.
    """
    from bnctl.commands.equivalence import may_branch, variations
    from bnctl.data.resize import other_batch_sizes, other_shapes, resized
    from bnctl.runtime import open_runner
    from bnctl.verification import compare_runners

    started = time.perf_counter()
    before, after = setup.open_all(baseline, candidate)
    first, second = open_runner(before, device=setup.device), open_runner(after, device=setup.device)

    example = setup.example(before, other=after)
    notes: list[str] = []

    def batches() -> Iterator[Batch]:
        given = [] if setup.data is not None and not setup.inputs else [example]
        source = chain(given, setup.batches() if setup.data is not None else [])
        for number, batch in enumerate(source, start=1):
            yield batch
            setup.progress("verify", number, None)

    def where_taken() -> Iterator[Sequence[Batch]]:
        fixed_batch = _has_fixed_batch(after)
        if fixed_batch:
            notes.append(f"{after.word} is made for one batch size: others were not compared")
        else:
            yield from ([other] for other in other_batch_sizes(example))
        if setup.data is not None:  # it says what values, choices and sizes matter
            return
        yield from variations(
            example, ("values", "choices"), device=setup.device, branching=may_branch(before) or may_branch(after)
        )
        fixed = False
        for ways in other_shapes(resized(example, 1) if example.size and not fixed_batch else example):
            by_first = list(islice(_taken(first, ways), 1))
            by_both = list(islice(_taken(second, by_first), 1))
            fixed |= len(by_both) < len(by_first)
            yield from ([other] for other in by_both)
        if fixed:
            notes.append(
                f"{after.word} takes only some of the sizes that {before.word} takes: these alone were compared"
            )

    verification = compare_runners(first, second, batches(), where_taken=where_taken(), tolerance=tolerance)
    return Report(
        "verify",
        Artifact(before.word, before.sha256),
        verification=verification.to_dict(),
        details={"candidate": {"path": after.word, "sha256": after.sha256}},
        summary={"passed": verification.passed},
        notes=tuple(notes),
        exit_code=_exit_code(verification),
        elapsed_s=time.perf_counter() - started,
    )


def _exit_code(verification: Verification) -> ExitCode:
    if verification.inconclusive:
        return ExitCode.INCONCLUSIVE
    return ExitCode.OK if verification.passed else ExitCode.FAILED


def _has_fixed_batch(model: Model) -> bool:
    """Whether a model says that it takes batches of one size only, as `export --static-batch` makes them."""
    native: Any = model.native
    if model.kind != "onnx":
        from bnctl.engines.torch.export import exported_axes

        dynamic = exported_axes(native) if model.dynamic_axes is None else model.dynamic_axes
        return dynamic is not None and not any(0 in axes for axes in dynamic)
    shapes = [value.shape for value in native.graph.inputs if value.name not in native.graph.initializers]
    with_axes = [shape for shape in shapes if shape is not None and len(shape)]
    return bool(with_axes) and all(isinstance(shape[0], int) for shape in with_axes)


def _taken(runner: Runner, batches: Sequence[Batch]) -> Iterator[Batch]:
    """Those of some batches that a model takes."""
    for batch in batches:
        with suppress(InputError):
            runner.run(batch)
            yield batch
