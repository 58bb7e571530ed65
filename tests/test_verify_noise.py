"""Rounding noise: what a saturated output is judged by, and that it hides no error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnctl.data.batches import Batch
from bnctl.runtime.noise import rounding_noise
from bnctl.runtime.torch import TorchRunner
from bnctl.verification import compare_runners


class Saturated(nn.Module):
    """A sigmoid of about -16: values of 1e-7 with a resolution of 6e-8."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        nn.init.constant_(self.linear.weight, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return 0.5 * (1 + torch.tanh((logits - 16.0) / 2))


@pytest.fixture
def batch() -> Batch:
    return Batch((np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32),))


def test_noise_is_measured_on_the_baseline(batch: Batch) -> None:
    runner = TorchRunner(Saturated())
    noise = rounding_noise(runner, batch, runner.run(batch))
    assert 0 <= noise["out"] < 1e-6


def test_an_error_of_the_size_of_rounding_passes(batch: Batch) -> None:
    result = compare_runners(TorchRunner(Saturated()), TorchRunner(Saturated(1 + 2.0**-21)), [batch])
    assert result.max_rel_error > result.tolerance, "the case must need the allowance"
    assert result.passed


def test_negative_control_an_error_beyond_rounding_fails(batch: Batch) -> None:
    result = compare_runners(TorchRunner(Saturated()), TorchRunner(Saturated(1.5)), [batch])
    assert not result.passed
    assert result.outputs[0].noise is not None
    assert result.outputs[0].max_abs > 2 * result.outputs[0].noise


def test_a_well_scaled_output_is_not_given_the_allowance(batch: Batch) -> None:
    linear, off = nn.Linear(8, 8), nn.Linear(8, 8)
    off.load_state_dict(linear.state_dict())
    with torch.no_grad():
        off.weight *= 1.001
    assert not compare_runners(TorchRunner(linear), TorchRunner(off), [batch]).passed
