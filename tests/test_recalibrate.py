"""Recalibration: against naive references, on awkward models, and with everything put back."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from bnctl.data.batches import Batch, as_batches
from bnctl.engines.torch import recalibrate as engine
from bnctl.engines.torch.recalibration import memory, run, schedules
from bnctl.engines.torch.recalibration.memory import LiveStorages
from bnctl.engines.torch.recalibration.operators import inference
from bnctl.engines.torch.recalibration.strand import Crew, Strand
from bnctl.engines.torch.recalibration.twins import Twins
from bnctl.errors import DataError, ModelError, UsageError
from bnctl.models.importing import import_module
from bnctl.numerics.moments import Moments
from bnctl.recalibration.statistics import Drift, SiteStatistics, count_dead, discrepancy, drift
from bnctl.recalibration.workers import Alone
from nets_resnet20 import build as build_resnet20

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_resnet20"
SCHEDULES = {"lockstep": None, "pass_per_site": 0}
"""`memory_bytes` that leads to each schedule of the exact method."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny, and threads that wait for each other on a busy machine make the tests ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recalibrate(model: nn.Module, batches: Iterable[Any], **how: Any) -> tuple[nn.Module, list[SiteStatistics], int]:
    """Three batches at a time, so that every test runs strands side by side."""
    found = engine.recalibrate(model, batches, **{"threads": 3, **how})
    return found.model, found.sites, found.samples


def conv(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, padding=1)


class Plain(nn.Module):
    """Two norms, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = conv(4, 5), nn.BatchNorm2d(5, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.head, self.bn3 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu_(x + self.bn2(self.conv2(x)))
        return self.bn3(self.head(x.mean((2, 3))))


class Concat(nn.Module):
    """Branches of different depth, joined before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = conv(3, 2), nn.BatchNorm2d(2)
        self.b, self.bn_b = conv(2, 3), nn.BatchNorm2d(3)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.bn_a(self.a(x)).sigmoid()
        return self.bn(torch.cat([a, self.bn_b(self.b(a))], 1))


class Stashing(nn.Module):
    """Keeps an activation in an attribute between layers, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.conv1(x)
        y = self.conv2(self.bn1(self.kept))
        return self.bn2(y + self.kept)


class Reused(nn.Module):
    """One norm called three times, each call on what the one before made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)
        self.last, self.bn_last = conv(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.bn(self.conv(x)))
        return self.bn_last(self.last(x))


class Heads(nn.Module):
    """A head shared by several scales, with two norms in a chain: called again, but not fed by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 3), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = conv(3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        scales = [x, F.avg_pool2d(x, 2), x[:, :, 1:]]
        return [self.bn2(self.conv2(F.relu(self.bn1(self.conv1(scale))))) for scale in scales]


class Branchy(nn.Module):
    """Batches take different ways: some skip a norm, and two norms come in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)
        self.bn_a, self.bn_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn_rare = nn.BatchNorm2d(3)
        self.bn_last = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = int(x[0, 0, 0, 0] * 1000) % 3
        x = self.conv(x)
        if way == 0:
            x = self.bn_b(torch.tanh(self.bn_a(x)))
        elif way == 1:
            x = self.bn_a(torch.tanh(self.bn_b(x)))
        else:
            x = self.bn_rare(x)
        return self.bn_last(F.relu(self.bn(x)))


ONCE = (Plain, Residual, Concat, Stashing)
AGAIN = (Reused, Heads, Branchy)


def images(samples: int = 23, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, samples).reshape(-1, 1, 1, 1)
    return torch.rand(samples, 3, 6, 6, generator=generator) * scale + 1


def split(x: torch.Tensor, size: int) -> list[Batch]:
    return [Batch((part,)) for part in x.split(size)]


def make(build: type[nn.Module], *, double: bool = True, seed: int = 0) -> nn.Module:
    """A net with statistics that are no defaults; by default in double precision, so that references can be met closely."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    return net.double() if double else net


def norms(net: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def inputs_of(net: nn.Module, name: str, batches: Iterable[Batch]) -> np.ndarray:
    """All that a norm sees in eval mode, (C, everything): an ordinary hook, all data in memory."""
    seen: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].double().numpy()
        seen.append(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).copy())

    handle = norms(net)[name].register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            net(*batch.args)
    handle.remove()
    return np.concatenate(seen, axis=1) if seen else np.empty((0, 0))


def order_of_execution(net: nn.Module, batches: Iterable[Batch]) -> list[str]:
    names: dict[str, None] = {}
    handles = [
        m.register_forward_pre_hook(lambda *_, n=name: names.update({n: None})) for name, m in norms(net).items()
    ]
    with torch.no_grad():
        for batch in batches:
            net(*batch.args)
    for handle in handles:
        handle.remove()
    return list(names)


def reference(model: nn.Module, batches: list[Batch], *, sweeps: int = 1) -> nn.Module:
    """Norm after norm in order of execution, each from all that it sees; sweeps until nothing moves for reused ones."""
    net = copy.deepcopy(model).eval()
    for _ in range(sweeps):
        for name in order_of_execution(net, batches):
            x = inputs_of(net, name, batches)
            norms(net)[name].running_mean.copy_(torch.from_numpy(x.mean(1)))
            norms(net)[name].running_var.copy_(torch.from_numpy(x.var(1)))
    return net


def error(net: nn.Module, other: nn.Module) -> float:
    """Largest relative difference of running statistics."""
    worst = 0.0
    for name, norm in norms(net).items():
        ref = norms(other)[name]
        sd = ref.running_var.sqrt()
        worst = max(worst, ((norm.running_mean - ref.running_mean).abs() / sd).max().item())
        worst = max(worst, ((norm.running_var - ref.running_var).abs() / ref.running_var).max().item())
    return worst


def by_name(sites: list[SiteStatistics]) -> dict[str, SiteStatistics]:
    return {site.name: site for site in sites}


# ---- against the references


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1, 5, 23])
@pytest.mark.parametrize("build", ONCE)
def test_exact_is_the_naive_reference(build: type[nn.Module], size: int, schedule: str) -> None:
    net, x = make(build), images().double()
    result, sites, samples = recalibrate(net, split(x, size), memory_bytes=SCHEDULES[schedule])
    assert error(result, reference(net, split(x, 23))) < 1e-11
    assert samples == 23
    assert [site.name for site in sites] == order_of_execution(net.eval(), split(x, 23))
    assert all(site.action == "recalibrated" and site.code is None for site in sites)
    assert all(site.self_consistency < 1e-12 for site in sites)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("build", AGAIN)
def test_exact_finds_the_fixed_point_of_norms_that_are_called_again(build: type[nn.Module], schedule: str) -> None:
    net, batches = make(build), split(images().double(), 3)
    result, sites, _ = recalibrate(net, batches, memory_bytes=SCHEDULES[schedule])
    assert error(result, reference(net, batches, sweeps=60)) < 1e-5
    assert all(site.code is None and site.self_consistency < 1e-6 for site in sites)


def test_branchy_batches_really_differ_in_order() -> None:
    orders = {tuple(order_of_execution(make(Branchy).eval(), [batch])) for batch in split(images().double(), 3)}
    assert {("bn_a", "bn_b", "bn", "bn_last"), ("bn_b", "bn_a", "bn", "bn_last")} <= orders
    assert any(order[0] == "bn_rare" for order in orders)


def test_calls_that_do_not_feed_themselves_are_exact() -> None:
    net, batches = make(Heads), split(images().double(), 7)
    result, sites, _ = recalibrate(net, batches)
    assert error(result, reference(net, batches, sweeps=3)) < 1e-11
    assert [site.calls for site in sites] == [12, 12]


@pytest.mark.parametrize("build", [*ONCE, *AGAIN])
def test_schedules_agree_in_single_precision(build: type[nn.Module]) -> None:
    net, batches = make(build, double=False), split(images(), 6)
    lockstep, _, _ = recalibrate(net, batches)
    passes, _, _ = recalibrate(net, batches, memory_bytes=0)
    assert error(lockstep, passes) < 1e-5
    again, _, _ = recalibrate(net, batches)
    assert all(torch.equal(a, b) for a, b in zip(lockstep.buffers(), again.buffers(), strict=True))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 23), max_size=5), st.sampled_from(ONCE))
def test_exact_does_not_depend_on_how_data_are_split(cuts: list[int], build: type[nn.Module]) -> None:
    net, x = make(build), images().double()
    parts = torch.tensor_split(x, sorted(cuts))
    result, _, _ = recalibrate(net, [Batch((part,)) for part in parts if len(part)])
    whole, _, _ = recalibrate(net, [Batch((x,))])
    assert error(result, whole) < 1e-11


def test_batch_is_the_naive_reference() -> None:
    """Norms in train mode, dropout off; by hand from what each norm is given."""
    net, batches = make(Plain), split(images().double(), 5)
    by_hand = copy.deepcopy(net).eval()
    for norm in norms(by_hand).values():
        norm.train()
    expected = {}
    for name in norms(by_hand):
        x = inputs_of(by_hand, name, batches)
        expected[name] = x.mean(1), x.var(1)
    result, sites, _ = recalibrate(net, batches, method="batch")
    for name, norm in norms(result).items():
        np.testing.assert_allclose(norm.running_mean, expected[name][0], rtol=1e-10)
        np.testing.assert_allclose(norm.running_var, expected[name][1], rtol=1e-10)
    assert sites[0].self_consistency < 1e-12  # nothing normalised before it
    assert sites[1].self_consistency > 1e-3  # small batches


@pytest.fixture
def probe_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, schedules):
        monkeypatch.setattr(module, "PROBE", 1)


@pytest.mark.usefixtures("probe_all")
def test_batch_self_consistency_is_what_the_eval_graph_produces() -> None:
    net, batches = make(Plain), split(images().double(), 5)
    result, sites, _ = recalibrate(net, batches, method="batch")
    x = inputs_of(result.eval(), "bn2", batches)
    norm = result.bn2
    shift = np.abs(norm.running_mean.numpy() - x.mean(1)) / np.sqrt(x.var(1) + norm.eps)
    spread = np.abs(norm.running_var.numpy() - x.var(1)) / (x.var(1) + norm.eps)
    assert sites[1].self_consistency == pytest.approx(max(shift.max(), spread.max()))


def test_methods_agree_on_one_batch() -> None:
    net, batches = make(Residual), split(images().double(), 23)
    exact, _, _ = recalibrate(net, batches)
    batch, _, _ = recalibrate(net, batches, method="batch")
    assert error(exact, batch) < 1e-10


@pytest.mark.parametrize("wrong", ["axis", "average of batches", "train mode"])
def test_the_reference_notices_wrong_statistics(wrong: str) -> None:
    """Negative controls: what today's tools do is far from the reference."""
    net, batches = make(Plain), split(images().double(), 22)  # 22 and 1
    good = reference(net, batches)
    bad = copy.deepcopy(good)
    if wrong == "axis":
        x = torch.cat([batch.args[0] for batch in batches])
        bad.bn1.running_mean.copy_(bad.conv1(x).mean((1, 2, 3))[:4].detach())
    elif wrong == "average of batches":
        means = [bad.conv1(batch.args[0]).mean((0, 2, 3)) for batch in batches]
        bad.bn1.running_mean.copy_(torch.stack(means).mean(0).detach())
    else:
        torch.manual_seed(0)
        torch.optim.swa_utils.update_bn([batch.args[0] for batch in batches], bad)
    assert error(bad, good) > 1e-2
    assert error(recalibrate(net, batches)[0], good) < 1e-11


def test_uneven_last_batch_weighs_by_its_size() -> None:
    """Trap 24: an average of batch means would give 4.5."""
    net = nn.Sequential(nn.BatchNorm1d(1))
    batches = [Batch((torch.zeros(8, 1),)), Batch((torch.full((1, 1), 9.0),))]
    result, _, _ = recalibrate(net, batches)
    assert result[0].running_mean.item() == pytest.approx(1.0)


def test_mean_much_larger_than_standard_deviation() -> None:
    x = 1e6 + 1e-2 * torch.randn(500, 2, dtype=torch.float64)
    result, _, _ = recalibrate(nn.BatchNorm1d(2).double(), split(x, 7))
    torch.testing.assert_close(result.running_var, x.var(0, correction=0), rtol=1e-5, atol=0)


def test_forwards_in_lockstep_need_modules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: batches that share a module overwrite what it keeps between its layers."""
    net, batches = make(Stashing), split(images(20).double(), 5)
    monkeypatch.setattr(Twins, "one", lambda twins: nullcontext(twins._model))
    assert error(recalibrate(net, batches)[0], reference(net, batches)) > 1e-3


# ---- strands


def strand_of(*values: int, at_end: BaseException | None = None) -> tuple[Strand[int], list[str]]:
    log: list[str] = []

    def body(pause: Callable[[int], None]) -> None:
        try:
            for value in values:
                try:
                    pause(value)
                except Exception:
                    log.append("swallowed")
            if at_end is not None:
                raise at_end
        finally:
            log.append("unwound")

    return Strand(body), log


def test_strand_takes_turns_with_its_owner() -> None:
    strand, log = strand_of(1, 2)
    crew = Crew(1)
    assert [run.value for _ in range(2) for run in crew.run([strand])] == [1, 2]
    assert log == []
    assert [run.value for run in crew.run([strand])] == [None]
    assert log == ["unwound"]
    strand.close()
    strand.close()


def test_a_crew_has_so_many_hands() -> None:
    """Strands are taken from the iterable only when there is a hand free, and all come back."""
    running, most, lock = 0, 0, threading.Lock()

    def body(pause: Callable[[int], None]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        pause(1)

    strands = [Strand(body) for _ in range(12)]
    assert len(set(Crew(3).run(strands))) == 12
    assert 2 <= most <= 3
    assert all(strand.value is None for strand in Crew(3).run(strands))


@pytest.mark.parametrize("resumed", [0, 1, 2])
def test_closing_a_strand_unwinds_it(resumed: int) -> None:
    threads = threading.active_count()
    strand, log = strand_of(1, 2, 3)
    for _ in range(resumed):
        list(Crew(1).run([strand]))
    strand.close()
    assert log == (["unwound"] if resumed else [])
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [ValueError("in the body"), KeyboardInterrupt()])
def test_strand_hands_errors_to_its_owner(error: BaseException) -> None:
    strand, _ = strand_of(1, at_end=error)
    others = [strand_of(1, 2)[0] for _ in range(4)]
    list(Crew(2).run([strand, *others]))
    threads = threading.active_count()
    with pytest.raises(type(error)):
        list(Crew(2).run([strand, *others]))
    for other in others:
        other.close()
    assert threading.active_count() == threads - 5


class Interrupting(Plain):
    """Something raises in the second batch, after the first norm."""

    what: BaseException = KeyboardInterrupt()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        if x[0, 0, 0, 0] == 1:
            raise self.what
        return self.bn2(self.conv2(y))


@pytest.mark.parametrize("memory_bytes", SCHEDULES.values())
@pytest.mark.parametrize("what", [KeyboardInterrupt(), ValueError("mine")])
def test_an_error_in_one_batch_ends_all(what: BaseException, memory_bytes: int | None) -> None:
    net, x = make(Interrupting).train(), images().double()
    net.what = what
    x[5, 0, 0, 0] = 1
    before, random_state, threads = snapshot(net), torch.get_rng_state(), threading.active_count()
    with pytest.raises(KeyboardInterrupt if isinstance(what, KeyboardInterrupt) else DataError, match=r"mine|^$"):
        recalibrate(net, split(x, 5), memory_bytes=memory_bytes)
    assert threading.active_count() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.is_grad_enabled()
    assert _len_torch_dispatch_stack() == 0


def test_a_model_may_catch_what_an_operator_raises() -> None:
    class Trying(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x @ torch.ones(1, 99, dtype=x.dtype)
            except RuntimeError:
                x = x * 2
            return super().forward(x)

    net, batches = make(Trying), split(images().double(), 5)
    assert error(recalibrate(net, batches)[0], reference(net, batches)) < 1e-11


# ---- memory


def test_live_storages_are_those_that_somebody_holds() -> None:
    x = torch.ones(1000)
    live = LiveStorages([x])
    with inference(live):
        y = x[::2] + 1
        _view = y[::2]
        z = y * 2
        assert live.size_bytes() == 4_000
        del z
        assert live.size_bytes() == 2_000


@pytest.mark.parametrize(("limit", "lockstep"), [(0.9, False), (1.1, True)])
def test_memory_decides_on_the_schedule(
    limit: float, lockstep: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A forward of Plain holds its input and the outputs of conv2 or of conv1 when it waits."""
    per_sample = 36 * 8 * (3 + 5)
    net, batches = make(Plain), split(images().double(), 5)
    with caplog.at_level("INFO", logger="bnctl"):
        recalibrate(net, batches, memory_bytes=int(limit * per_sample * 23))
    assert ("one pass per layer" in caplog.text) != lockstep
    caplog.clear()
    monkeypatch.setattr("bnctl.engines.torch.recalibration.run.MAX_STRANDS", 4)
    with caplog.at_level("INFO", logger="bnctl"):
        recalibrate(net, batches, memory_bytes=10**9)
    assert "one pass per layer" in caplog.text


def test_workers_on_one_machine_share_its_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOfTwo(Alone):
        size = 2

    batches = split(images(23), 5)
    monkeypatch.setattr(run, "available_bytes", lambda device: 10**7)
    for beside, alone in (("2", True), ("1000", False)):
        caplog.clear()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        with caplog.at_level("INFO", "bnctl"):
            recalibrate(Plain(), batches, workers=OneOfTwo())
            assert ("one pass per layer" in caplog.text) != alone
            caplog.clear()
            recalibrate(Plain(), batches)  # one process has all of it, whatever started it
            assert "one pass per layer" not in caplog.text


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(Plain().eval(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match="is TorchScript") as caught:
        recalibrate(scripted, split(images(4), 2))
    assert caught.value.hint


def test_available_memory(tmp_path: Path) -> None:
    assert memory.available_bytes(torch.device("cpu")) > 1 << 20
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n", encoding="ascii")
    assert memory._machine_bytes(meminfo) == 7 * 1024
    assert memory._machine_bytes(tmp_path / "none") > 1 << 20
    assert memory._group_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("300\n", encoding="ascii")
    assert memory._group_bytes(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert memory._group_bytes(tmp_path) is None


# ---- what is a norm


class Functional(nn.Module):
    """A norm that no class of torch stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stats_mean", torch.zeros(3))
        self.register_buffer("stats_var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.stats_mean, self.stats_var)


def population(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_functional_norm(method: Any) -> None:
    x = images()
    result, sites, _ = recalibrate(Functional(), split(x, 5), method=method)
    torch.testing.assert_close((result.stats_mean, result.stats_var), population(x))
    assert sites[0].name == "stats_mean"


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_sync_norm_needs_no_process_group(method: Any) -> None:
    x = images()
    result, _, _ = recalibrate(nn.SyncBatchNorm(3), split(x, 5), method=method)
    torch.testing.assert_close((result.running_mean, result.running_var), population(x))


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_timm_norm_with_activation(method: Any) -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    timm_layers = import_module("timm.layers")
    x = images()
    net = nn.Sequential(timm_layers.BatchNormAct2d(3), nn.Conv2d(3, 3, 1))
    result, sites, _ = recalibrate(net, split(x, 5), method=method)
    torch.testing.assert_close((result[0].running_mean, result[0].running_var), population(x))
    assert sites[0].name == "0"


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_instance_norm_gets_the_averages_that_it_tracks(method: Any) -> None:
    x = images()
    result, _, _ = recalibrate(nn.InstanceNorm2d(3, track_running_stats=True), split(x, 5), method=method)
    torch.testing.assert_close(result.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(result.running_var, x.var((2, 3), correction=0).mean(0))


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("method", ["exact", "batch"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_graph(method: Any, decompose: bool) -> None:
    net, x = make(Residual, double=False).eval(), images()
    dims = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(net, (x,), dynamic_shapes=dims)
    module = (program.run_decompositions() if decompose else program).module()
    result, sites, _ = recalibrate(module, split(x, 8), method=method)
    expected, _, _ = recalibrate(net, split(x, 8), method=method)
    assert [site.name for site in sites] == ["bn1", "bn2", "bn3"]
    buffers = dict(result.named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_tied_statistics_are_one_site() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)).double()
    net[3].running_mean, net[3].running_var = net[1].running_mean, net[1].running_var
    result, sites, _ = recalibrate(net, split(images().double(), 5))
    assert [(site.name, site.calls) for site in sites] == [("1", 10)]
    assert result[3].running_mean is result[1].running_mean
    assert sites[0].self_consistency < 1e-6


# ---- what is left, and why


def codes(sites: list[SiteStatistics]) -> dict[str, str | None]:
    return {site.name: site.code for site in sites}


def test_selection() -> None:
    net, batches = make(Residual), split(images().double(), 5)
    result, sites, _ = recalibrate(net, batches, where="bn*", skip=["bn2"])
    assert codes(sites) == {"bn1": None, "bn2": "BN301", "bn3": None}
    assert torch.equal(result.bn2.running_mean, net.bn2.running_mean)
    half = copy.deepcopy(net)
    half.bn1, half.bn3 = result.bn1, result.bn3
    x = inputs_of(half.eval(), "bn3", batches)  # what went through the old statistics of bn2
    np.testing.assert_allclose(result.bn3.running_mean, x.mean(1), rtol=1e-10)
    for method in ("exact", "batch"):
        with pytest.raises(UsageError, match="no layer matches 'nothing'"):
            recalibrate(net, batches, where="nothing", method=method)


@pytest.mark.parametrize("mark", ["eval mode", "momentum"])
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_frozen_on_purpose(mark: str, method: Any) -> None:
    net, batches = make(Residual).train(), split(images().double(), 5)
    if mark == "eval mode":
        net.bn1.eval()
    else:
        net.bn1.momentum = 0.0
    result, sites, _ = recalibrate(net, batches, method=method)
    assert codes(sites) == {"bn1": "BN303", "bn2": None, "bn3": None}
    assert torch.equal(result.bn1.running_var, net.bn1.running_var)
    _, sites, _ = recalibrate(net, batches, method=method, where=["bn1", "bn[23]"])
    assert codes(sites) == {"bn1": None, "bn2": None, "bn3": None}


def test_parameters_without_gradient_do_not_freeze_statistics() -> None:
    _, sites, _ = recalibrate(make(Plain).requires_grad_(False), split(images().double(), 5))
    assert set(codes(sites).values()) == {None}


class FrozenNorm(nn.Module):
    """As in torchvision: everything a buffer, applied by hand."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((3,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class InTrainMode(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.stats_mean, self.stats_var, training=True)


class Homeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = torch.zeros(3), torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_every_norm_that_is_left_has_its_reason(method: Any) -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(3), FrozenNorm(), InTrainMode(), Homeless(), nn.BatchNorm2d(3, track_running_stats=False)
    )
    net.unused = nn.BatchNorm2d(7)
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[method-assign]
    result, sites, _ = recalibrate(_Calling(net), split(images(), 5), method=method)
    assert codes(sites) == {
        "net.0": None,
        "net.1": "BN303",
        "net.2.stats_mean": "BN304",
        "(unnamed)": "BN305",
        "net.4": "BN304",
        "net.unused": "BN302",
    }
    assert all(site.reason for site in sites if site.action == "left")
    assert torch.equal(result.net[2].stats_mean, torch.zeros(3))


class _Calling(nn.Module):
    """All children of a Sequential but `unused`, in order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        del net.forward
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.net.named_children():
            if name != "unused":
                x = layer(x)
        return x


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_calls_without_values_leave_a_site_as_it_is(method: Any) -> None:
    class Empty(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn2(self.conv2(self.bn1(self.conv1(x)))[:0])
            return x

    net = make(Empty)
    result, sites, _ = recalibrate(net, split(images().double(), 5), method=method)
    assert codes(sites) == {"bn1": None, "bn2": "BN302"}
    assert torch.equal(result.bn2.running_mean, net.bn2.running_mean)


def test_an_iteration_that_does_not_settle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnctl.engines.torch.recalibration import schedules

    monkeypatch.setitem(schedules.solve.__kwdefaults__, "max_rounds", 2)
    _, sites, _ = recalibrate(make(Reused), split(images().double(), 5))
    assert codes(sites) == {"bn": "BN306", "bn_last": None}
    assert by_name(sites)["bn"].self_consistency > 1e-6
    assert by_name(sites)["bn_last"].self_consistency < 1e-12


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


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


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


def test_a_model_that_cannot_be_copied() -> None:
    net = Plain()
    net.kept = net.conv1.weight * 2
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


# ---- what is reported


def test_drift_is_the_symmetric_divergence() -> None:
    rng = np.random.default_rng(0)
    before, after = (rng.normal(size=3), rng.random(3) + 0.5), (rng.normal(size=3), rng.random(3) + 0.5)

    def gaussian(statistics: tuple[np.ndarray, np.ndarray]) -> torch.distributions.Normal:
        mean, var = map(torch.from_numpy, statistics)
        return torch.distributions.Normal(mean, (var + 1e-3).sqrt())

    p, q = gaussian(before), gaussian(after)
    divergence = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    found = drift(before, after, 1e-3)
    assert found is not None
    assert (found.mean, found.max) == pytest.approx((divergence.mean().item(), divergence.max().item()))


def test_drift_of_channels_without_variance() -> None:
    still = (np.zeros(2), np.zeros(2))
    assert drift(still, still, 0.0) == Drift(0.0, 0.0)
    moved = drift(still, (np.ones(2), np.zeros(2)), 0.0)
    assert moved is not None
    assert np.isfinite(moved.max)


def test_discrepancy_is_in_units_of_the_layer() -> None:
    produced = np.array([1.0, 2.0]), np.array([4.0, 1.0])
    assert discrepancy((np.array([1.0, 2.0]), np.array([4.0, 1.0])), produced, 0.0) == 0
    assert discrepancy((np.array([1.5, 2.0]), np.array([4.0, 1.0])), produced, 0.0) == pytest.approx(0.25)
    assert discrepancy((np.array([1.0, 2.0]), np.array([4.0, 1.2])), produced, 0.0) == pytest.approx(0.2)


def test_dead_channels() -> None:
    assert count_dead(Moments(2, np.array([0.0, 1.0, 1.0]), np.array([0.0, 1e-20, 1.0])), 1e-7) == 2
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        net[0].weight[1] = 0
    _, sites, _ = recalibrate(net, split(images(), 5))
    assert sites[0].dead_channels == 1
    assert sites[0].count == 23 * 36
    assert sites[0].to_dict()["drift"].keys() == {"mean", "max"}


# ---- a real network


def shifted(file: Path, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at 0.3 of their contrast, as the network takes them, and labels."""
    data = np.load(file)
    x = (data["x"][:samples] / 255 - 0.5) * 0.3 + 0.5
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(x.transpose(0, 3, 1, 2)).float(), torch.from_numpy(data["y"][:samples])


@pytest.mark.usefixtures("probe_all")
def test_recalibration_recovers_accuracy_under_a_shift() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    if not CIFAR.is_dir():
        pytest.skip(f"{CIFAR} with the trained ResNet-20 is not here")
    net = build_resnet20().eval()
    missing = net.load_state_dict(safetensors.load_file(CIFAR / "resnet20_cifar10.safetensors"), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    x, y = shifted(CIFAR / "test.npz", 2000)
    calibration = split(shifted(CIFAR / "calibration.npz", 1000)[0], 128)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            predictions = torch.cat([model(part).argmax(1) for part in x.split(500)])
        return (predictions == y).double().mean().item()

    assert accuracy(net) == pytest.approx(0.6775, abs=0.002)
    consistency = {}
    for method in ("exact", "batch"):
        result, sites, samples = recalibrate(net, calibration, method=method)
        assert samples == 1000
        assert len(sites) == 19
        assert 0.80 < accuracy(result) < 0.91
        consistency[method] = max(site.self_consistency for site in sites)
        assert by_name(sites)["bn1"].drift.max > 1
    assert consistency["exact"] < 1e-6 < consistency["batch"]
