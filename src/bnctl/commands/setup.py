"""What several commands share: how models and data are opened, and on which inputs a model is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import UsageError

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.data.synthetic import InputSpec
    from bnctl.models.model import Model
    from bnctl.models.spec import ModelWord

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how far it is, and out of how much (None where nobody knows)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Setup:
    """The common options of the command line.

    Args:
        weights: for a factory that names none itself.
        model_args: keyword arguments of factories.
        trust: let files that can run code do so.
        trusted_factories: globs of factories that bundles may name.
        factory: what to build a bundle with instead of what it names.
        inputs: example shapes.
        data: the `--data` word.
        preprocess: file for image folders and uint8 images.
        batch_size: samples per batch.
        limit: at most this many samples.
        workers: threads that decode images ahead.
        seed: of synthetic data and orders.
        device: "cpu" or "cuda".
        threads: intra-op threads.
        progress: is told how far long work is.
    """

    weights: Path | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    trusted_factories: tuple[str, ...] = ()
    factory: str | None = None
    inputs: tuple[InputSpec, ...] = ()
    data: str | None = None
    preprocess: Path | None = None
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    progress: Progress = no_progress

    def open(self, word: str) -> Model:
        """Open a model."""
        return self.open_all(word)[0]

    def open_all(self, *words: str) -> tuple[Model, ...]:
        """Open all models of a command line."""
        from bnctl.models.open import open_model
        from bnctl.models.spec import BundleWord, FactoryWord

        return tuple(
            open_model(
                word,
                model_args=self.model_args if isinstance(word, FactoryWord) else {},
                trust=self.trust,
                trusted_factories=self.trusted_factories,
                factory=self.factory if isinstance(word, BundleWord) else None,
            )
            for word in self.parse(*words)
        )

    def parse(self, *words: str) -> tuple[ModelWord, ...]:
        """Parse all MODEL words of a command line.

        Raises:
            UsageError: `weights`, `model_args` or `factory` are given, and no model here takes them.
            ModelError: a word names no model.
        """
        from bnctl.models.spec import BundleWord, FactoryWord, parse_model_words

        parsed = parse_model_words(words, weights=self.weights)
        if self.model_args and not any(isinstance(word, FactoryWord) for word in parsed):
            raise UsageError(
                "--model-arg: no model here is built by a factory", hint="it goes to package.module:callable"
            )
        if self.factory is not None and not any(isinstance(word, BundleWord) for word in parsed):
            raise UsageError("--factory: no model here is a bundle", hint="give the factory itself as the MODEL")
        return parsed

    def batches(self) -> Iterable[Batch]:
        """The data.

        Raises:
            UsageError: there is no `--data`.
        """
        if self.data is None:
            raise UsageError(
                "this command needs data",
                hint="give --data folder/, file.npz, file.parquet, shards/*.tar, hf:NAME, package.module:loader, or random:N with --input",
            )
        from bnctl.data.open import open_data
        from bnctl.data.preprocess import load_preprocess

        preprocess = load_preprocess(self.preprocess) if self.preprocess else None
        return open_data(
            self.data,
            batch_size=self.batch_size,
            preprocess=preprocess,
            inputs=self.inputs,
            seed=self.seed,
            limit=self.limit,
            workers=self.workers,
        )

    def example(self, model: Model, *, run: bool = True, other: Model | None = None) -> Batch:
        """The inputs on which a model is looked at; none where an ONNX graph is only read.

        Drawn at random as `--input` says, else the first batch of `--data`; else drawn at random, as an ONNX model's signature says, or a bundle's record; else
        those with which a `.pt2` was exported.

        Args:
            model: the model.
            run: whether it will be run; a torch model always is.
            other: a model that is to take the same inputs, where they are drawn.

        Raises:
            UsageError: none of these is there.
        """
        from bnctl.data.batches import Batch
        from bnctl.data.synthetic import parse_input, random_batch

        if model.kind == "onnx" and not run:
            return Batch()

        if self.inputs:
            if self.data is not None and not Path(self.data).exists():
                self.batches()  # which says what is wrong, where the data are no pattern and no loader
            return random_batch(self.inputs, seed=self.seed)
        if self.data is not None:
            return next(iter(self.batches()))
        if model.kind == "onnx":
            from bnctl.engines.onnx.signature import input_specs

            sizes = other.native if other is not None and other.kind == "onnx" else None
            specs = input_specs(model.native, model.word, sizes)
            return random_batch(specs, seed=self.seed) if specs else Batch()
        if model.origin is not None and model.origin.inputs:
            return random_batch([parse_input(word) for word in model.origin.inputs], seed=self.seed)
        if model.program is not None and model.program.example_inputs is not None:
            args, kwargs = model.program.example_inputs
            return Batch(tuple(args), dict(kwargs))
        raise UsageError(
            f"{model.word} does not say what its inputs look like",
            hint="give --input 1x3x224x224 (repeatable) or --data",
        )
