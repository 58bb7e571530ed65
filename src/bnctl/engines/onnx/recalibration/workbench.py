"""The data as the model's inputs, and one part of the model run on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.recalibration.activations import activation_seen
from bnctl.engines.onnx.recalibration.extract import extracted
from bnctl.engines.onnx.recalibration.network import Network
from bnctl.engines.onnx.recalibration.sites import Arrays, Site
from bnctl.engines.onnx.shapes import dtype_name
from bnctl.errors import DataError, InputError, ModelError
from bnctl.recalibration.method import check_pass, not_finite
from bnctl.recalibration.seen import Seen
from bnctl.recalibration.until import part
from bnctl.runtime.feeds import InputSpec, dtype_of, match_inputs
from bnctl.runtime.ort import OrtRunner, from_array, view

if TYPE_CHECKING:
    import onnxruntime

    from bnctl.data.batches import Batches

Values = Mapping[str, "onnxruntime.OrtValue"]
"""Values of the model by name, in the runtime's own memory."""


@dataclass(frozen=True, eq=False)
class Feed:
    """What is known of a batch at the border between two levels; `index` counts from 0."""

    index: int
    values: Values

    def only(self, values: Iterable[ir.Value]) -> Feed:
        """The batch with these values alone."""
        return Feed(self.index, {name: self.values[name] for name in (str(value.name) for value in values)})

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(value.tensor_size_in_bytes() for value in self.values.values() if value.is_tensor())


@dataclass(eq=False)
class Workbench:
    """Runs a model level by level.

    The runtime's graph optimisations are off, as everywhere in bnctl where numbers matter: it rewrites BatchNormalization itself, and not always exactly.

    Args:
        network: the model.
        batches: can be gone through as often as needed, and give as many samples each time.
        threads: of each session.
        name: what to call the model in errors.
        progress: called with what is being done, how far it is, and out of how much.
        skip_bad: leave out batches that hold NaN or infinity, instead of an error.
        limit: only batches of an index below; for data of unknown length.
        stride: only one batch of so many.
        cut: whether the limit was met before the end of the data.
        samples: how many the data hold; known after the first pass.
        samples_so_far: how many the pass that is under way has given.
        resolution: machine epsilon of what each site saw.
        skipped: batches that were left out.
    """

    network: Network
    batches: Batches
    threads: int
    name: str
    progress: Callable[[str, int, int | None], None]
    skip_bad: bool = False
    limit: int | None = None
    stride: int = 1
    cut: bool = False
    samples: int | None = None
    samples_so_far: int = 0
    resolution: dict[Site, float] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    def feeds(self, step: int = 1, first: int = 0, samples: int = 0) -> Iterator[Feed]:
        """One pass over the data, or over one batch of every `step`.

        Args:
            step: see above.
            first: index of the batch to begin with.
            samples: how many come before it.

        Raises:
            DataError: there are no data, other data than last time, a value is NaN or infinite, or the model does not take it.
        """
        specs = [_spec(value) for value in self.network.inputs]
        for index, batch in self.batches.every(first, step * self.stride):
            if self.limit is not None and index >= self.limit:
                self.cut = True
                break
            try:
                arrays = match_inputs(batch, specs, (), self.name)
            except InputError as error:
                raise DataError(f"batch {index}: {error.message}", hint=error.hint) from error
            bad = next((n for n, a in arrays.items() if a.dtype.kind == "f" and not np.isfinite(a).all()), None)
            if bad is not None and self.skip_bad:
                self.skipped.add(index)
                continue
            if bad is not None:
                raise DataError(
                    f"batch {index}: input {bad} holds NaN or infinity",
                    hint="statistics of it would be NaN, too: clean the data, or leave such batches out with --on-bad-batch skip",
                )
            samples += batch.size
            self.samples_so_far = samples
            yield Feed(index, {name: from_array(array) for name, array in arrays.items()})
        if step == 1:
            check_pass(samples, self.samples, skipped=bool(self.skipped))
            self.samples = samples

    def start_over(self, count: int | None) -> None:
        """Another number of batches, at least."""
        self.stride, self.limit = part(self.batches, count)
        self.cut, self.samples = False, None
        self.skipped.clear()

    def seen_by(self, site: Site, feed: Feed) -> Seen:
        """What a site sees of a batch.

        Raises:
            DataError: it is not finite.
        """
        value = feed.values[str(self.network.x(site).name)]
        x = view(value)
        assert x is not None, "what is normalised is a tensor"
        self.resolution[site] = float(ml_dtypes.finfo(ir.DataType(value.element_type()).numpy()).eps)  # type: ignore[no-untyped-call]
        seen = activation_seen(x, site.axis)
        if not (np.isfinite(seen.values.mean).all() and np.isfinite(seen.values.m2).all()):
            raise not_finite(feed.index, site.name)
        return seen

    def inputs_of(self, site: Site, arrays: Arrays) -> dict[str, onnxruntime.OrtValue]:
        """The statistics of a site as inputs of the model."""
        inputs = self.network.statistics[site]
        return {str(inputs[role].name): from_array(array) for role, array in arrays.items()}


class Part:
    """What lies between the border behind one level and the sites of a later one. The session is opened with the first batch, which shows the types.

    Args:
        bench: the model and its data.
        start: the level behind whose border it begins; -1: at the data.
        end: the level whose sites, and whose border, it computes.
    """

    def __init__(self, bench: Workbench, start: int, end: int) -> None:
        self._bench = bench
        network = bench.network
        self._given = network.boundary(start)
        self._wanted = [v for v in network.wanted(end) if v not in self._given]
        self._runner: OrtRunner | None = None

    def run(self, feed: Feed, statistics: Values) -> Feed:
        """The batch at the end, with all that was known of it at the start.

        Raises:
            DataError: the model fails on the batch.
            ModelError: it cannot be loaded.
        """
        if not self._wanted:
            return feed
        if self._runner is None:
            self._runner = self._open(feed)
        try:
            computed = self._runner.run_values({**feed.values, **statistics})
        except ModelError as error:
            raise DataError(
                f"batch {feed.index} does not run through the model: {error.message}",
                hint="check shape, dtype and preprocessing of the data against the model's inputs",
            ) from error
        return Feed(feed.index, {**feed.values, **computed})

    def _open(self, feed: Feed) -> OrtRunner:
        network = self._bench.network
        given = {v: _type(feed.values[str(v.name)]) for v in self._given}
        given |= {v: v.type for values in network.statistics.values() for v in values.values() if v.type is not None}
        part = extracted(network.model, given, self._wanted)
        return OrtRunner(part, threads=self._bench.threads, name=self._bench.name, shared_arena=True)


def _spec(value: ir.Value) -> InputSpec:
    sizes = () if value.shape is None else value.shape
    # a free size is a name, or what exporters write for one
    return InputSpec(
        str(value.name),
        "" if value.dtype is None else dtype_name(value.dtype),
        tuple(size if isinstance(size, int) and size >= 0 else None for size in sizes),
    )


def _type(value: onnxruntime.OrtValue) -> ir.TypeProtocol:
    if value.is_tensor():
        return ir.TensorType(ir.DataType(value.element_type()))
    element = value.data_type().removeprefix("seq(").removesuffix(")")
    return ir.SequenceType(ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype_of(element)))))
