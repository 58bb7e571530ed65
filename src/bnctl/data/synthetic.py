"""Inputs by shape: `--input` words, and `random:N`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnctl.data.batches import Batch
from bnctl.errors import DataError, UsageError

_WORD = re.compile(r"(?:(?P<name>[^:]+):)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class InputSpec:
    """Shape, name and dtype of one input; without a name it is positional."""

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str = "float32"


def parse_input(word: str) -> InputSpec:
    """Parse ``1x3x224x224`` or ``name:1x3x32x32:float32``.

    Raises:
        UsageError: it is of another form, a size is 0, or the dtype is unknown.
    """
    match = _WORD.fullmatch(word.strip())
    hint = "for example --input 1x3x224x224, or --input mask:1x128:int64"
    if match is None:
        raise UsageError(f"--input {word!r} is not a shape", hint=hint)
    shape = tuple(int(n) for n in match["shape"].split("x"))
    dtype = match["dtype"] or "float32"
    if 0 in shape:
        raise UsageError(f"--input {word!r} has an axis of size 0", hint=hint)
    try:
        kind = np.dtype(dtype).kind
    except TypeError:
        kind = ""
    if kind not in set("iufb"):
        raise UsageError(
            f"--input {word!r}: unknown dtype {dtype!r}", hint="float32, float64, float16, int64, int32, uint8, bool"
        )
    return InputSpec(shape, match["name"], dtype)


def random_batch(inputs: Iterable[InputSpec], *, seed: int = 0, size: int | None = None) -> Batch:
    """One batch: standard normal floats, whole numbers 0 or 1, seeded.

    Args:
        inputs: what the model takes.
        seed: of the generator.
        size: replaces the first axis of every input.
    """
    generator = np.random.default_rng(seed)
    args, kwargs = [], {}
    for spec in inputs:
        shape = spec.shape if size is None else (size, *spec.shape[1:])
        dtype = np.dtype(spec.dtype)
        drawn = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
        if spec.name is None:
            args.append(drawn.astype(dtype))
        else:
            kwargs[spec.name] = drawn.astype(dtype)
    return Batch(tuple(args), kwargs)


@dataclass(frozen=True)
class RandomData:
    """N synthetic samples; the same on every pass."""

    samples: int
    inputs: Sequence[InputSpec]
    batch_size: int
    seed: int = 0

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for number, start in enumerate(range(0, self.samples, self.batch_size)):
            size = min(self.batch_size, self.samples - start)
            yield random_batch(self.inputs, seed=self.seed + number, size=size)


def open_random(
    word: str, *, inputs: Sequence[InputSpec], batch_size: int, seed: int, limit: int | None = None
) -> RandomData:
    """``random:N``.

    Raises:
        DataError: N is no number above 0.
        UsageError: there is no `--input` that gives the shape.
    """
    count = word.partition(":")[2]
    if not count.isdigit() or int(count) == 0:
        raise DataError(f"--data {word}: how many samples?", hint="for example --data random:256")
    if not inputs:
        raise UsageError(f"--data {word} needs the shape of an input", hint="give --input 1x3x224x224")
    samples = int(count) if limit is None else min(int(count), limit)
    return RandomData(samples, tuple(inputs), batch_size, seed)
