"""A random transform of training, applied to data: the same for every pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.batches import Batch, Batches
from bnctl.data.loader import is_loader_word, resolve
from bnctl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_EXAMPLE = "for instance my_transforms:train, a function or a torchvision Compose"


def load_transform(word: str) -> Callable[[Any], Any]:
    """The transform that `package.module:callable` names; the current folder is importable, also while it runs.

    Raises:
        DataError: the word has another form, the import fails, or there is no such callable.
    """
    from bnctl.models.importing import current_folder_importable

    if not is_loader_word(word):
        raise DataError(f"{word}: no transform is named so", hint=f"name it as package.module:callable, {_EXAMPLE}")
    call = resolve(word)

    def transform(sample: Any) -> Any:
        with current_folder_importable():
            return call(sample)

    return transform


def augmented(batches: Batches, call: Callable[[Any], Any], *, seed: int, name: str = "the transform") -> Batches:
    """Data with a transform applied to every sample of the first input, after the preprocessing.

    The transform is given a torch tensor on the CPU without the batch axis, such as (C, H, W) float32, and returns a tensor or
    an array; it may work in place. Results are stacked, so that they need one shape; of a list of images they make a list. Labels and other inputs
    stay as they are.

    torch's generator (of the CPU), numpy's legacy one and Python's `random` are seeded by (`seed`, number of the sample), and put back after
    each batch: the result is the same for every pass, batch size and share of the batches. Other generators are the transform's own matter.

    Args:
        batches: the data; their length is kept.
        call: the transform.
        seed: not negative.
        name: what to call it in errors.

    Raises:
        DataError: during a pass: the transform fails on a sample, returns something else, or returns other shapes.
    """

    def read(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        for index, batch in batches.every(first, step):
            yield index, _transformed(batch, call, seed, name)

    return replace(batches, read=read)


def _transformed(batch: Batch, call: Callable[[Any], Any], seed: int, name: str) -> Batch:
    if batch.args:
        return replace(batch, args=(_samples(batch.args[0], batch, call, seed, name), *batch.args[1:]))
    first = next(iter(batch.kwargs))
    return replace(batch, kwargs={**batch.kwargs, first: _samples(batch.kwargs[first], batch, call, seed, name)})


def _samples(value: Any, batch: Batch, call: Callable[[Any], Any], seed: int, name: str) -> Any:
    import torch

    results: list[Any] = []
    with _generators_put_back():
        for position in range(batch.size):
            number = batch.start + position
            _seed_generators(seed, number)
            try:
                results.append(_result(value, position, call))
            except Exception as error:  # whatever the user's code raises
                raise DataError(
                    f"{name} fails on sample {number}: {type(error).__name__}: {error}",
                    hint=f"it is given one sample at a time, without the batch axis: a tensor of {_described(value[position])}",
                ) from error
    if isinstance(value, list):
        return results
    for position, result in enumerate(results):
        if result.shape != results[0].shape:
            raise DataError(
                f"{name} makes {_described(results[0])} of sample {batch.start} and {_described(result)} of sample {batch.start + position}",
                hint="results are stacked: end it with a crop or a resize to one size",
            )
    return np.stack(results) if isinstance(value, np.ndarray) else torch.stack(results)


def _result(value: Any, position: int, call: Callable[[Any], Any]) -> Tensor | NDArray[Any]:
    """What the transform makes of a copy of one sample: an array where the data are one, else a tensor."""
    import torch

    sample = value[position]
    result = call(sample.detach().cpu().clone() if isinstance(sample, torch.Tensor) else torch.tensor(sample))
    if not isinstance(result, (torch.Tensor, np.ndarray)):
        raise TypeError(f"it returned a {type(result).__name__}, not a tensor or an array")
    tensor = result.detach().cpu() if isinstance(result, torch.Tensor) else torch.tensor(np.array(result))
    return tensor.numpy() if isinstance(value, np.ndarray) else tensor


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"{value.dtype} {tuple(shape)}"


def _seed_generators(seed: int, number: int) -> None:
    import torch

    word = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    # Not torch.manual_seed: that would seed the generators of all accelerators too, for good.
    torch.default_generator.manual_seed(word)
    np.random.seed(word)
    random.seed(word)


@contextmanager
def _generators_put_back() -> Iterator[None]:
    import torch

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
