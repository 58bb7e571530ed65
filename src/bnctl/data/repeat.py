"""Data that are the same in every pass, and for every worker, though their loader shuffles."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bnctl.data.batches import Batch, Batches


def repeated(batches: Batches, seed: int) -> Batches:
    """Data of which every pass begins with generators of the same seed: Python's, numpy's legacy one, and torch's, where torch is loaded.

    A loader that shuffles or augments with one of them gives the same samples in the same order each time; one with a generator of
    its own must see to that itself.

    Args:
        batches: the data; their length is kept.
        seed: not negative.
    """

    def read(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if "torch" in sys.modules:
            sys.modules["torch"].default_generator.manual_seed(seed)
        yield from batches.every(first, step)

    return replace(batches, read=read)
