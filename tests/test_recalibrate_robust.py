"""Recalibration on awkward models and data, with everything put back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnctl.data.batches import Batch, as_batches
from bnctl.errors import DataError, ModelError, UsageError
from torch_recalibration import (
    SCHEDULES,
    Plain,
    by_name,
    error,
    images,
    make,
    recalibrate,
    reference,
    snapshot,
    split,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- what the data may do


def test_no_norm() -> None:
    for method in ("exact", "batch"):
        with pytest.raises(ModelError, match="no normalisation") as caught:
            recalibrate(nn.Conv2d(3, 3, 1), split(images(), 5), method=method)
        assert "bnctl insert" in (caught.value.hint or "")


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_empty_loader(method: Any) -> None:
    with pytest.raises(DataError, match="no samples"):
        recalibrate(Plain(), [], method=method)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_batch_that_is_not_finite(method: Any, value: float) -> None:
    x = images()
    x[12, 0, 0, 0] = value
    with pytest.raises(DataError, match="batch 2 holds NaN or infinity"):
        recalibrate(Plain(), split(x, 5), method=method)


@pytest.mark.parametrize("how", [{"method": "batch"}, {"memory_bytes": None}, {"memory_bytes": 0}])
def test_activation_that_is_not_finite_names_batch_and_layer(how: dict[str, Any]) -> None:
    class Overflowing(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x)) / (x.amax((1, 2, 3), keepdim=True) < 3.5)))

    with pytest.raises(DataError, match="batch 3: the input of bn2"):
        recalibrate(make(Overflowing, double=False), split(images(), 5), **how)


def test_old_statistics_may_be_broken() -> None:
    """They are what is replaced: the probing pass must not stumble over them."""
    net, batches = make(Plain), split(images().double(), 5)
    expected = reference(net, batches)
    net.bn1.running_var.fill_(float("nan"))
    result, sites, _ = recalibrate(net, batches)
    assert error(result, expected) < 1e-11
    assert by_name(sites)["bn1"].drift is None
    assert by_name(sites)["bn2"].drift is not None


def test_one_value_per_channel() -> None:
    net, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(4, 3)
    with pytest.raises(DataError, match="one value per channel") as caught:
        recalibrate(net, split(x, 1), method="batch")
    assert "exact" in (caught.value.hint or "")
    result, _, _ = recalibrate(net, split(x, 1))
    torch.testing.assert_close(result[1].running_var, net[0](x).var(0, correction=0).detach())


def test_batch_that_does_not_fit_the_model() -> None:
    for memory_bytes in SCHEDULES.values():
        batches = [*split(images(), 8), Batch((torch.rand(2, 4, 6, 6),))]
        with pytest.raises(DataError, match="batch 3 does not run through the model: RuntimeError"):
            recalibrate(Plain(), batches, memory_bytes=memory_bytes)


def test_a_generator_is_noticed() -> None:
    with pytest.raises(DataError, match="second pass"):
        recalibrate(Plain(), as_batches(part for part in images().split(5)), method="batch")
    with pytest.raises(DataError, match="23 samples in the first pass and 10 in a later one"):
        recalibrate(Plain(), _Shrinking(), memory_bytes=0)


class _Shrinking:
    def __init__(self) -> None:
        self.samples = [23, 23, 10]

    def __iter__(self) -> Iterator[Batch]:
        return iter(split(images(self.samples.pop(0)), 5))


def test_numpy_batches_and_keyword_inputs() -> None:
    x = images()
    by_keyword = [Batch((), {"x": part.numpy().astype(np.float64)}) for part in x.split(5)]
    net = make(Plain, double=False)
    assert error(recalibrate(net, by_keyword)[0], recalibrate(net, split(x, 5))[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norms_too", [True, False])
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_half_precision(dtype: torch.dtype, norms_too: bool, method: Any) -> None:
    net = make(Plain, double=False).to(dtype)
    if not norms_too:
        net.bn1.float()
        net.bn2.float()
    batches = [Batch((part.numpy(),)) for part in images().split(5)]
    result, sites, _ = recalibrate(net, batches, method=method)
    assert [buffer.dtype for buffer in result.buffers()] == [buffer.dtype for buffer in net.buffers()]
    assert error(result.float(), recalibrate(make(Plain, double=False), batches, method=method)[0]) < 0.1
    assert by_name(sites)["bn1"].self_consistency < torch.finfo(dtype).eps


def test_statistics_that_do_not_fit_the_type() -> None:
    net = nn.BatchNorm1d(1).half()
    with pytest.raises(ModelError, match="do not fit float16"):
        recalibrate(net, [Batch((torch.tensor([[-3e4], [3e4]]).half(),))])


# ---- everything is put back


@pytest.mark.parametrize("how", [{"method": "batch"}, {"memory_bytes": None}, {"memory_bytes": 0}])
def test_only_running_statistics_differ(how: dict[str, Any]) -> None:
    net = make(Plain).train()
    net.conv2.eval()
    calls: list[int] = []
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    net.bn1.num_batches_tracked.fill_(7)
    before, modes = snapshot(net), [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    result, _, _ = recalibrate(net, split(images().double(), 5), **how)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(result.state_dict()[name], tensor) != ("running" in name), name
    for model in (net, result):
        assert [m.training for m in model.modules()] == modes
        assert (model.bn1.momentum, model.bn2.momentum) == (0.1, None)
        assert len(model.conv1._forward_hooks) == 1
    assert calls
    assert result.bn1.num_batches_tracked == 7
    assert torch.is_grad_enabled()


@dataclass
class Raising:
    """A loader that shuffles, and raises in the middle of a pass."""

    error: BaseException
    passes: int = 0

    def __iter__(self) -> Iterator[Batch]:
        torch.randperm(5)
        if self.passes == 0:
            yield from split(images(10), 5)
            raise self.error
        self.passes -= 1
        yield from split(images(23), 5)


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("how", [{"method": "batch"}, {"memory_bytes": 0}])
@pytest.mark.parametrize("what", [ValueError("loader"), KeyboardInterrupt()])
def test_a_loader_that_raises_leaves_nothing_behind(what: BaseException, how: dict[str, Any], passes: int) -> None:
    net = make(Plain, double=False).train()
    before, random_state = snapshot(net), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt if isinstance(what, KeyboardInterrupt) else DataError):
        recalibrate(net, Raising(what, passes), **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert all(m.training for m in net.modules())


def test_passes_see_the_same_shuffled_data() -> None:
    x = images()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5, shuffle=True)
    net = make(Plain, double=False)
    torch.manual_seed(3)
    seen: list[torch.Tensor] = []

    class Watching:
        def __iter__(self) -> Iterator[Batch]:
            for (part,) in loader:
                seen.append(part)
                yield Batch((part,))

    recalibrate(net, Watching(), method="batch")
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:], strict=True))
    assert not torch.equal(torch.cat(seen[:5]), x)


def test_a_tensor_that_a_module_has_computed_and_kept() -> None:
    net, plain = make(Plain, double=False), make(Plain, double=False)
    net.kept = net.conv1.weight * 2  # with a history, which copy.deepcopy refuses
    (found, *_), (expected, *_) = (recalibrate(n, split(images(), 5)) for n in (net, plain))
    assert found.kept.grad_fn is None
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), expected.buffers(), strict=True))


def test_a_model_that_cannot_be_copied() -> None:
    net = Plain()
    net.kept = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        recalibrate(net, split(images(), 5))


def test_unknown_method_and_device() -> None:
    with pytest.raises(UsageError, match="'mean'"):
        recalibrate(Plain(), split(images(), 5), method="mean")
    with pytest.raises(UsageError, match="cannot use device 'nowhere'"):
        recalibrate(Plain(), split(images(), 5), device="nowhere")


def test_progress_is_told() -> None:
    for how, stages in (({}, {"settle"}), ({"method": "batch"}, {"gather", "measure"})):
        told: list[tuple[str, int, int | None]] = []
        recalibrate(Plain(), split(images(), 5), progress=lambda *step: told.append(step), **how)  # noqa: B023
        assert {stage for stage, _, _ in told} == stages


# ---- models that write to their own tensors


class Cached(Plain):
    """Writes to a buffer in each forward pass, reads it afterwards, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(5, 4, 6, 6))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.cache[: len(x)] = self.conv1(x)
        x = torch.relu(self.bn1(self.cache[: len(x)]))
        return self.bn2(self.conv2(x)) * self.count


class CachedSometimes(Cached):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


@pytest.mark.parametrize("how", [{"method": "batch"}, {"memory_bytes": None}, {"memory_bytes": 0}])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_model_writes_to_its_buffers_stays_with_the_batch(how: dict[str, Any], threads: int) -> None:
    """Passes that take turns would read what another one wrote, and agree with themselves."""
    net, plain = make(Cached), make(Plain)
    plain.load_state_dict(net.state_dict(), strict=False)
    net.cache, before = net.cache.double(), copy.deepcopy(net.state_dict())
    batches = split(images().double(), 5)
    result, _, _ = recalibrate(net, batches, threads=threads, **how)
    expected, _, _ = recalibrate(plain, batches, **how)
    assert error(result.bn1, expected.bn1) < 1e-11
    assert error(result.bn2, expected.bn2) < 1e-11
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not result.cache.any()


class Clamping(Plain):
    """Writes to its statistics, and changes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn1.running_var.clamp_(min=1e-12)
        return super().forward(x)


class Views(Plain):
    """Two buffers in one storage, written together, and read apart."""

    def __init__(self) -> None:
        super().__init__()
        cache = torch.zeros(2, 5, 4, 6, 6, dtype=torch.float64)
        self.register_buffer("both", cache)
        self.register_buffer("first", cache[0])
        self.register_buffer("second", cache[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        self.first[: len(x)], self.second[: len(x)] = y, -y
        x = torch.relu(self.bn1(self.both[0, : len(x)]))
        return self.bn2(self.conv2(x) - 0 * self.both[1, : len(x), :1])


class Growing(Plain):
    """A buffer that is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.empty(0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.resize_(len(x), 4, 6, 6).copy_(self.conv1(x))
        return self.bn2(self.conv2(torch.relu(self.bn1(self.cache))))


class Replacing(Cached):
    """Gives its buffer other memory, which no operator does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.data = self.conv1(x)
        return self.bn2(self.conv2(torch.relu(self.bn1(self.cache))))


class Swallowing(CachedSometimes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            self.cache[0, 0, 0, :2] = x[0, 0, 0, :2] if x.sum() > 0 else 0 * self.cache[0, 0, 0, :2]
        except Exception:
            return x
        return super().forward(x)


class Sparse(Plain):
    """A buffer without memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.eye(36, dtype=torch.float64).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = torch.sparse.mm(self.mixing, x.flatten(2).flatten(0, 1).T)
        return super().forward(columns.T.reshape(x.shape))


@pytest.mark.parametrize("build", [CachedSometimes, Clamping, Views, Growing, Swallowing, Replacing, Sparse])
@pytest.mark.parametrize("how", [{"method": "batch"}, {"memory_bytes": None}, {"memory_bytes": 0}])
@pytest.mark.parametrize("threads", [1, 3])
def test_models_that_write_to_their_own_tensors(build: type[nn.Module], how: dict[str, Any], threads: int) -> None:
    net, plain = make(build), make(Plain)
    if hasattr(net, "cache"):
        net.cache = net.cache.double()
    plain.load_state_dict(net.state_dict(), strict=False)
    x = images().double()
    x[:5], x[5:] = -x[:5].abs(), x[5:].abs()
    result, sites, _ = recalibrate(net, split(x, 5), threads=threads, **how)
    expected, _, _ = recalibrate(plain, split(x, 5), **how)
    assert [site.action for site in sites] == ["recalibrated"] * 2
    assert error(result.bn1, expected.bn1) < 1e-11
    assert error(result.bn2, expected.bn2) < 1e-11
