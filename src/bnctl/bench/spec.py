"""What a bench is asked to measure, and what crosses over to its worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bnctl.errors import UsageError

if TYPE_CHECKING:
    from bnctl.models import Model

# stage, steps done, steps planned so far
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchModel:
    """A model as the command line names it; the arguments are those of ``bnctl.models.open_model``."""

    word: str
    weights: str | None = None
    model_args: Mapping[str, Any] | None = None
    trust: bool = False
    trusted_factories: tuple[str, ...] = ()
    factory: str | None = None

    def open(self) -> Model:
        """The model itself.

        Raises:
            ModelError: see ``bnctl.models.open_model``.
        """
        from bnctl.models import open_model

        return open_model(
            self.word,
            weights=self.weights,
            model_args=self.model_args,
            trust=self.trust,
            trusted_factories=self.trusted_factories,
            factory=self.factory,
        )


@dataclass(frozen=True)
class LatencyOptions:
    """How latency is measured.

    Attributes:
        threads: of each model.
        device: "cpu" or "cuda".
        processes: worker processes to begin with; also how many confirm a failed gate.
        max_processes: when to give up on the precision.
        precision: half width of the interval to reach, relative: 0.01 is 1 %.
        block_ms: how long one model runs before the next one has its turn.
        rounds: turns of each model per process.
        process_s: time to spend on the turns of one process; at least three are taken, however slow a model is.
        timeout_s: when a worker process counts as hung.
        seed: of the order of turns.
    """

    threads: int = 1
    device: str = "cpu"
    processes: int = 5
    max_processes: int = 15
    precision: float = 0.01
    block_ms: float = 20.0
    rounds: int = 15
    process_s: float = 20.0
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            "threads must be at least 1": self.threads < 1,
            "processes must be at least 2: one says nothing about the spread": self.processes < 2,
            "max_processes must not be less than processes": self.max_processes < self.processes,
            "precision, block_ms, rounds, process_s and timeout_s must be positive": not (
                min(self.precision, self.block_ms, self.rounds, self.process_s, self.timeout_s) > 0
            ),
        }
        for problem, holds in problems.items():
            if holds:
                raise UsageError(f"bench: {problem}", hint="correct the option")


@dataclass(frozen=True)
class WorkerSpec:
    """One worker's task, JSON on its standard input.

    Attributes:
        models: the baseline, then the candidates.
        inputs: file with the pickled ``(args, kwargs)`` of the batch, written by the parent in a folder of its own.
        result: file for the :class:`ProcessResult`.
        options: as for the whole bench.
        seed: of this process.
    """

    models: tuple[BenchModel, ...]
    inputs: str
    result: str
    options: LatencyOptions
    seed: int

    def to_json(self) -> str:
        """As one JSON document."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerSpec:
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        for model in fields["models"]:
            model["trusted_factories"] = tuple(model["trusted_factories"])
        fields["models"] = tuple(BenchModel(**model) for model in fields["models"])
        fields["options"] = LatencyOptions(**fields["options"])
        return cls(**fields)


@dataclass(frozen=True)
class Turns:
    """Timings in one process, with the runtime's own optimisations on or off.

    Attributes:
        optimised: whether the runtime optimised.
        kinds: engine of each model ("onnx", "torch"), the baseline first.
        calls_ns: per instance, per turn, per call: nanoseconds. Instances are the baseline, the baseline loaded a
            second time, then the candidates.
    """

    optimised: bool
    kinds: tuple[str, ...]
    calls_ns: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class ProcessResult:
    """What one worker process measured."""

    turns: tuple[Turns, ...] = field(default=())

    def to_json(self) -> str:
        """As one JSON document."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessResult:
        """The inverse of :meth:`to_json`."""

        def tuples(value: Any) -> Any:
            return tuple(map(tuples, value)) if isinstance(value, list) else value

        fields = json.loads(text)
        return cls(tuple(Turns(**{key: tuples(value) for key, value in turns.items()}) for turns in fields["turns"]))
