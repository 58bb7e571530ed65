"""What a pass changes in a module is put back: the user's model is after a fold what it was before."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnctl
from bnctl.engines.torch.state import snapshot
from nets_traps import _fast, randomise  # noqa: F401


class Collecting(nn.Module):
    """Writes down every call, in all ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.count, self.total, self.seen = 0, torch.zeros(1), [(torch.zeros(2), [0])]
        self.shapes: dict[Any, int] = {}
        self.last: deque[Any] = deque(["first"], maxlen=2)
        self.register_buffer("buffer", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.total += 1
        self.buffer += 1
        self.seen[0][0].add_(1)
        self.seen[0][1].append(len(x))
        self.seen.append((torch.ones(1), []))
        self.shapes[tuple(x.shape)] = len(x)
        self.last.append(x)
        self.new = x
        return self.head(self.bn(self.conv(x) * 0.5).mean((2, 3)))  # type: ignore[no-any-return]

    def state(self) -> Any:
        return (
            self.count,
            self.total.tolist(),
            self.buffer.tolist(),
            [(t.tolist(), list(n)) for t, n in self.seen],
            dict(self.shapes),
            list(self.last),
            hasattr(self, "new"),
        )


@pytest.fixture
def model() -> Collecting:
    torch.manual_seed(0)
    return randomise(Collecting())  # type: ignore[return-value]


def test_a_fold_leaves_nothing_behind(model: Collecting) -> None:
    before = model.state()
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [s.action for s in result.report.sites] == ["folded"]
    assert model.state() == before
    assert result.model.state() == before


def test_a_pass_does_change_it(model: Collecting) -> None:
    """The control, and what is put back."""
    before, containers = model.state(), (model.seen, model.shapes, model.last)
    restore = snapshot(model)
    model(torch.randn(2, 3, 8, 8))
    assert all(a != b for a, b in zip(before, model.state(), strict=True))
    restore()
    assert model.state() == before
    assert all(a is b for a, b in zip(containers, (model.seen, model.shapes, model.last), strict=True))


def test_tensors_that_cannot_be_written_are_left() -> None:
    model = nn.Module()
    model.table = torch.zeros(1).expand(4)
    with torch.inference_mode():
        model.made = torch.zeros(3)
    restore = snapshot(model)
    model.table = None
    restore()
    assert model.table.tolist() == [0, 0, 0, 0]
    assert model.made.is_inference()


def _resized(s: nn.Module, x: Tensor) -> None:
    s.t.resize_(x.numel()).fill_(1)


def _replaced(s: nn.Module, x: Tensor) -> None:
    s.t.data = x.mean((1, 2, 3))


def _written(s: nn.Module, x: Tensor) -> None:
    s.t.data.add_(1)


def _extended(s: nn.Module, x: Tensor) -> None:
    if "extra" not in s._modules:
        s.extra = nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize("change", [_resized, _replaced, _written, _extended])
@pytest.mark.parametrize("buffer", [True, False])
def test_whatever_a_pass_does_to_a_tensor_is_undone(change: Any, buffer: bool) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            if buffer:
                self.register_buffer("t", torch.zeros(2))
            else:
                self.t = torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            change(self, x)
            return self.bn(self.conv(x))  # type: ignore[no-any-return]

    model = randomise(Changing())
    names = set(model.state_dict())
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [s.action for s in result.report.sites] == ["folded"]
    assert model.t.tolist() == [0, 0]
    assert set(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_buffers_that_cannot_be_written_are_no_hindrance() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model.register_buffer("expanded", torch.ones(4, 1, 1).expand(4, 4, 4))
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(3))
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [s.action for s in result.report.sites] == ["folded"]
