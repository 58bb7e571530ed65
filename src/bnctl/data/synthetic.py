"""Synthetic data: shapes from `--input`, values from a random generator."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.batches import Batch, CountedBatches, located
from bnctl.errors import UsageError

_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = ("float16", "bfloat16", "float32", "float64", *_INTEGERS, "bool")

_EXAMPLES = "for instance 1x3x224x224, image:1x3x32x32 or tokens:1x128:int64"
_SHAPE = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True)
class InputSpec:
    """An example input of a model.

    Attributes:
        shape: sizes of all axes; axis 0 counts samples. Empty for a scalar.
        name: of the input; None: by position.
        dtype: name of the element type, one of `DTYPES`.

    Raises:
        UsageError: a size is not positive, or the type is unknown.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise UsageError(f"input {self}: sizes must be positive", hint=_EXAMPLES)
        if self.dtype not in DTYPES:
            near = difflib.get_close_matches(self.dtype, DTYPES) or DTYPES
            raise UsageError(f"input {self}: unknown type {self.dtype}", hint=f"one of {', '.join(near)}")

    def __str__(self) -> str:
        name = "" if self.name is None else f"{self.name}:"
        return f"{name}{'x'.join(map(str, self.shape))}:{self.dtype}"


def specs_of(batch: Batch) -> tuple[InputSpec, ...]:
    """What :func:`random_batch` needs to draw inputs like these; empty where an input is no array or tensor."""
    named = [*((None, value) for value in batch.args), *batch.kwargs.items()]
    if not all(hasattr(value, "shape") and hasattr(value, "dtype") for _, value in named):
        return ()
    found = [(tuple(value.shape), name, str(value.dtype).removeprefix("torch.")) for name, value in named]
    return tuple(InputSpec(*entry) for entry in found if entry[2] in DTYPES and 0 not in entry[0])


def parse_input(text: str) -> InputSpec:
    """Parse `[name:]1x3x224x224[:dtype]`; `flag::bool` is a scalar. The name may hold colons itself.

    Raises:
        UsageError: there is no shape in it, a size is 0, or the type is unknown.
    """
    parts = text.strip().split(":")
    if _SHAPE.fullmatch(parts[-1]):
        *name, shape = parts
        dtype = "float32"
    elif len(parts) > 1 and (_SHAPE.fullmatch(parts[-2]) or not parts[-2]):  # no sizes: a scalar, flag::bool
        *name, shape, dtype = parts
    else:
        raise UsageError(f"--input {text}: no shape in it", hint=_EXAMPLES)
    if name and not ":".join(name):
        raise UsageError(f"--input {text}: the name is empty", hint=_EXAMPLES)
    return InputSpec(tuple(map(int, shape.split("x"))) if shape else (), ":".join(name) or None, dtype)


def random_batch(specs: Sequence[InputSpec], *, seed: int = 0) -> Batch:
    """One batch of exactly these shapes; distributed as in :func:`random_batches`.

    Raises:
        UsageError: there are no inputs, or two have one name.
    """
    return _assembled(_checked(specs), [_draw(spec, spec.shape, seed, index) for index, spec in enumerate(specs)])


def random_batches(samples: int, specs: Sequence[InputSpec], *, batch_size: int = 32, seed: int = 0) -> CountedBatches:
    """`samples` synthetic samples, the same for a seed on every pass and whatever the batch size.

    Floats are standard normal; bool and integers are 0 or 1, which any embedding and any mask takes; uint8, most often pixels,
    is uniform from 0 to 255. Inputs whose axis 0 has the size of the first one's that is no scalar are per sample; others keep their shape, and
    are the same in every batch. No labels.

    Raises:
        UsageError: there are no inputs, two have one name, or `samples` is not positive.
    """
    _checked(specs)
    if samples < 1:
        raise UsageError(f"random:{samples} holds no samples", hint="for instance random:256")

    per_sample = next((spec.shape[:1] for spec in specs if spec.shape), None)
    if per_sample is None:
        raise UsageError(f"random:{samples}: no input has an axis of samples, all are scalars", hint=_EXAMPLES)

    def values(index: int, spec: InputSpec, place: slice) -> NDArray[Any]:
        if spec.shape[:1] != per_sample:
            return _draw(spec, spec.shape, seed, index)
        return np.stack([_draw(spec, spec.shape[1:], seed, index, i) for i in range(place.start, place.stop)])

    def read(places: Iterable[slice]) -> Iterator[Batch]:
        for place in places:
            drawn = [values(index, spec, place) for index, spec in enumerate(specs)]
            yield replace(_assembled(specs, drawn), start=place.start)

    return located(samples, batch_size, read)


def _checked(specs: Sequence[InputSpec]) -> Sequence[InputSpec]:
    if not specs:
        raise UsageError("random data need the shapes of the inputs", hint=f"give --input, {_EXAMPLES}")
    names = [spec.name for spec in specs if spec.name is not None]
    if len(set(names)) < len(names):
        raise UsageError(f"two inputs have one name: {', '.join(names)}", hint="name each input once")
    return specs


def _assembled(specs: Sequence[InputSpec], values: Sequence[NDArray[Any]]) -> Batch:
    pairs = list(zip(specs, values, strict=True))
    return Batch(
        tuple(value for spec, value in pairs if spec.name is None),
        {spec.name: value for spec, value in pairs if spec.name is not None},
    )


def _draw(spec: InputSpec, shape: tuple[int, ...], *seed: int) -> NDArray[Any]:
    """Values from a generator of their own: one per input and sample, so that they depend on neither batches nor what else is drawn."""
    generator = np.random.default_rng(seed)
    if "float" in spec.dtype:
        values: NDArray[Any] = generator.standard_normal(shape)
    else:
        values = generator.integers(0, 256 if spec.dtype == "uint8" else 2, shape)
    return np.asarray(values).astype(_numpy_dtype(spec.dtype))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
