"""absorb_output and absorb_input against torch's own operators, for every layout of a weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnctl.graph.ops import Conv, Linear, LinearOp, WeightLayout
from bnctl.numerics.absorb import absorb_input, absorb_output

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def conv(groups: int) -> tuple[LinearOp, tuple[int, ...], Run]:
    return Conv(WeightLayout(groups)), (8, 4 // groups, 3, 2), lambda x, w, b: F.conv2d(x, w, b, groups=groups)


def transposed(groups: int, out: int) -> tuple[LinearOp, tuple[int, ...], Run]:
    op = Conv(WeightLayout(groups, out_first=False), transposed=True)
    return op, (4, out // groups, 2, 2), lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=groups)


def gemm(alpha: float, beta: float) -> tuple[LinearOp, tuple[int, ...], Run]:
    op = Linear(WeightLayout(out_first=False), weight_factor=alpha, bias_factor=beta)
    return op, (4, 6), lambda x, w, b: alpha * x @ w + (0 if b is None else beta * b)


CASES = {
    "conv": conv(1),
    "grouped": conv(2),
    "depthwise": conv(4),
    "transposed": transposed(1, 4),
    "transposed grouped": transposed(2, 6),
    "transposed depthwise": transposed(4, 8),
    "linear": (Linear(WeightLayout()), (6, 4), F.linear),
    "matmul": gemm(1, 1),
    "gemm": gemm(0.5, -2),
}
INPUT_SIDE = [name for name in CASES if "transposed" not in name]  # what overlaps unevenly sees a border


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def axis(op: LinearOp, vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, 1, 1) if isinstance(op, Conv) else vector


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_output_side(name: str, bias: bool) -> None:
    op, shape, run = CASES[name]
    channels_in, channels_out = op.layout.channels(shape)
    w, b = draw(*shape), draw(channels_out) if bias else None
    x = draw(2, channels_in, 5, 5) if isinstance(op, Conv) else draw(3, channels_in)
    s, t = torch.linspace(-1, 2, channels_out).double(), torch.linspace(1, -1, channels_out).double()
    new = absorb_output(op, w.numpy(), None if b is None else b.numpy(), s.numpy(), t.numpy())
    wanted = axis(op, s) * run(x, w, b) + axis(op, t)
    assert torch.allclose(run(x, *map(torch.from_numpy, new)), wanted)
    assert not torch.allclose(run(x, torch.from_numpy(new[0]), b), wanted)  # without the shift it is wrong


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUT_SIDE)
def test_input_side(name: str, bias: bool) -> None:
    op, shape, run = CASES[name]
    channels_in, channels_out = op.layout.channels(shape)
    w, b = draw(*shape), draw(channels_out) if bias else None
    x = draw(2, channels_in, 5, 5) if isinstance(op, Conv) else draw(3, channels_in)
    s, t = torch.linspace(-1, 2, channels_in).double(), torch.linspace(1, -1, channels_in).double()
    new = absorb_input(op, w.numpy(), None if b is None else b.numpy(), s.numpy(), t.numpy())
    assert torch.allclose(run(x, *map(torch.from_numpy, new)), run(axis(op, s) * x + axis(op, t), w, b))


@pytest.mark.parametrize("name", CASES)
def test_layout_there_and_back(name: str) -> None:
    op, shape, _ = CASES[name]
    weight = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(op.layout.stored(op.layout.canonical(weight)), weight)
