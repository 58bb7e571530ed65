"""Recalibration in lockstep: strands that pause, and the memory that they hold."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from bnctl.engines.torch.recalibration import memory, run
from bnctl.engines.torch.recalibration.memory import LiveStorages
from bnctl.engines.torch.recalibration.operators import inference
from bnctl.engines.torch.recalibration.strand import Crew, Strand
from bnctl.errors import DataError, ModelError
from bnctl.recalibration.workers import Alone
from torch_recalibration import (
    SCHEDULES,
    Plain,
    error,
    images,
    make,
    recalibrate,
    reference,
    snapshot,
    split,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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
