"""`bnctl bench`: accuracy and latency side by side, and gates on them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bnctl.bench.gates import exit_code
from bnctl.bench.run import run_bench
from bnctl.bench.spec import BenchModel, LatencyOptions
from bnctl.commands.setup import Setup
from bnctl.models.digest import sha256_file
from bnctl.models.spec import BUNDLE_JSON, BundleWord, FactoryWord, ModelWord
from bnctl.report import Artifact, Report


def run_bench_command(
    words: Sequence[str], setup: Setup, *, gates: Sequence[str], accuracy: bool, latency: bool, options: LatencyOptions
) -> Report:
    """Measure candidates against the first model and judge the gates."""
    started = time.perf_counter()
    parsed = setup.parse(*words)
    models = [
        BenchModel(
            word=word.word,
            weights=str(word.weights) if isinstance(word, FactoryWord) and word.weights is not None else None,
            model_args=dict(setup.model_args) if isinstance(word, FactoryWord) else None,
            trust=setup.trust,
            trusted_factories=setup.trusted_factories,
            factory=setup.factory if isinstance(word, BundleWord) else None,
        )
        for word in parsed
    ]
    result = run_bench(
        models,
        setup.batches(),
        gates=gates,
        accuracy=accuracy,
        latency=latency,
        options=options,
        progress=lambda stage, done, planned: setup.progress(stage, done, planned or None),
    )
    baseline, *candidates = (Artifact(word.word, _sha256(word)) for word in parsed)
    document = result.to_dict() | {"candidates": [{"path": c.path, "sha256": c.sha256} for c in candidates]}
    notes = tuple(document.pop("notes"))
    if not gates:
        notes = (*notes, "no --gate was given: nothing was judged")
    return Report(
        "bench",
        baseline,
        summary={"verdict": result.verdict, "models": list(words)},
        details=document,
        notes=notes,
        exit_code=exit_code(result.verdict),
        elapsed_s=time.perf_counter() - started,
    )


def _sha256(word: ModelWord) -> str | None:
    """Of what :class:`bnctl.models.model.Model` says."""
    if isinstance(word, FactoryWord):
        return None if word.weights is None else sha256_file(word.weights)
    return sha256_file(word.path / BUNDLE_JSON if isinstance(word, BundleWord) else word.path)
