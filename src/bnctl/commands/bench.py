"""`bnctl bench`: accuracy and latency side by side, and gates on them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bnctl.bench.gates import exit_code
from bnctl.bench.run import run_bench
from bnctl.bench.spec import BenchModel, LatencyOptions
from bnctl.commands.setup import Setup
from bnctl.models.spec import FactoryWord, parse_model_words
from bnctl.report import Artifact, Report


def run_bench_command(
    words: Sequence[str], setup: Setup, *, gates: Sequence[str], accuracy: bool, latency: bool, options: LatencyOptions
) -> Report:
    """Measure candidates against the first model and judge the gates."""
    started = time.perf_counter()
    parsed = parse_model_words(words, weights=setup.weights)
    models = [
        BenchModel(
            word=word.word,
            weights=str(word.weights)
            if isinstance(word, FactoryWord) and word.weights is not None and "@" not in word.word
            else None,
            model_args=dict(setup.model_args) if isinstance(word, FactoryWord) else None,
            trust=setup.trust,
            trusted_factories=setup.trusted_factories,
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
    document = result.to_dict()
    notes = tuple(document.pop("notes"))
    return Report(
        "bench",
        Artifact(words[0]),
        summary={"verdict": result.verdict, "models": list(words)},
        details=document,
        notes=notes,
        exit_code=exit_code(result.verdict) if gates else exit_code("pass"),
        elapsed_s=time.perf_counter() - started,
    )
