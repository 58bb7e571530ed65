"""`bnctl verify`: do two models compute the same?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnctl.commands.setup import Setup
from bnctl.errors import ExitCode
from bnctl.report import Artifact, Report

if TYPE_CHECKING:
    from bnctl.data.batches import Batch


def run_verify(baseline: str, candidate: str, setup: Setup, *, tolerance: float | None) -> Report:
    """Compare two models on data, or on the example and other batch sizes. A failure is a result: exit code 1."""
    from bnctl.data.resize import other_batch_sizes
    from bnctl.runtime import open_runner
    from bnctl.verification import compare_runners

    started = time.perf_counter()
    before, after = setup.open_all(baseline, candidate)
    first, second = open_runner(before, device=setup.device), open_runner(after, device=setup.device)

    example = setup.example(before)

    def batches() -> Iterator[Batch]:
        source = setup.batches() if setup.data is not None else [example]
        for number, batch in enumerate(source, start=1):
            yield batch
            setup.progress("verify", number, None)

    verification = compare_runners(
        first, second, batches(), where_taken=[[other] for other in other_batch_sizes(example)], tolerance=tolerance
    )
    return Report(
        "verify",
        Artifact(before.word, before.sha256),
        verification=verification.to_dict(),
        details={"candidate": {"path": after.word, "sha256": after.sha256}},
        summary={"passed": verification.passed},
        exit_code=ExitCode.OK if verification.passed else ExitCode.FAILED,
        elapsed_s=time.perf_counter() - started,
    )
