"""Recalibration by several processes: the same bits as by one, errors that name the worker, and runs that go on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

PROGRAM = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from torch import nn
    from bnctl.data.batches import Batch
    from bnctl.engines.torch import recalibrate as engine
    from bnctl.recalibration import until
    from bnctl.engines.torch.recalibration.group import joined
    from bnctl.errors import BnctlError
    from bnctl.recalibration.partial import Partial

    conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1)

    class Net(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how = how
            self.a, self.bn_a, self.b, self.bn_b = conv(3, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)
            self.c, self.bn_c = conv(4, 5), nn.BatchNorm2d(5)
            self.bn_rare = nn.BatchNorm2d(4)

        def forward(self, x):
            index, how = round(float(x[0, 0, 0, 0])), self.how
            if int(os.environ.get("RANK", 0)) == how.get("rank") and index == how.get("at"):
                if how["end"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("mine")
            x = torch.relu(self.bn_a(self.a(x)))
            if index % 3 == 2:  # some batches, of some workers only
                x = self.bn_rare(x)
            for _ in range(2 if how.get("again") else 1):
                x = torch.relu(self.bn_b(self.b(x)))
            return self.bn_c(self.c(x))

    def run(workers, how):
        torch.manual_seed(0)
        x = torch.rand(46, 3, 6, 6)
        batches = [Batch((part,)) for part in x.split(4)]  # 12, the last one smaller
        for index, batch in enumerate(batches):
            batch.args[0][0, 0, 0, 0] = index
        partial = Partial(Path(how["partial"]), every_s=0) if "partial" in how else None
        options = how.get("options", {})
        found = engine.recalibrate(Net(how), batches, workers=workers, partial_file=partial, resume=partial is not None, **options)
        if partial is not None and workers.rank == 0:
            partial.remove()
        state = {n: t.numpy().tobytes().hex() for n, t in found.model.state_dict().items() if "running" in n}
        sites = [[s.name, s.action, s.count, s.calls, s.self_consistency, s.standard_error] for s in found.sites]
        return {"state": state, "sites": sites, "samples": found.samples}

    torch.set_num_threads(1)
    until.PILOT_SAMPLES = 8
    try:
        with joined() as workers:
            print(json.dumps([run(workers, how) for how in json.loads(sys.argv[1])]))
    except BnctlError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}))
        sys.exit(2)
    """
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run(tmp_path: Path, size: int, *hows: dict[str, Any]) -> list[tuple[int, Any]]:
    """Exit code and output of each worker, which does one run after the other."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)} if size > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(program), json.dumps(hows)],
                env=shared | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        lines = out.strip().splitlines()
        ended.append((process.returncode, json.loads(lines[-1]) if lines else {}))
    return ended


HOW = {
    "exact": {},
    "exact, a layer called twice": {"again": True},
    "one pass per layer": {"options": {"memory_bytes": 0}},
    "batch": {"options": {"method": "batch"}},
    "ema": {"options": {"method": "ema"}},
    "prior": {"options": {"prior": 20}},
    "until": {"options": {"until": 0.1}},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes of each."""
    [(code, found)] = run(tmp_path_factory.mktemp("alone"), 1, *HOW.values())
    assert code == 0
    return dict(zip(HOW, found, strict=True))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, size: int, alone: dict[str, Any]) -> None:
    for code, found in run(tmp_path, size, *HOW.values()):
        assert code == 0
        for name, of_name in zip(HOW, found, strict=True):
            assert of_name == alone[name], name


def test_the_comparison_notices_another_result(alone: dict[str, Any]) -> None:
    """Negative control: no two of the runs have the same statistics, but for the two schedules of the exact method."""
    states = {name: json.dumps(found["state"], sort_keys=True) for name, found in alone.items()}
    assert states.pop("one pass per layer") == states["exact"]
    assert len(set(states.values())) == len(states)
    assert 8 <= alone["until"]["samples"] < alone["exact"]["samples"] == 46


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_of_one_worker_ends_all_and_names_it(tmp_path: Path, rank: int) -> None:
    ended = run(tmp_path, 3, {"rank": rank, "at": 6 + rank, "end": "raise"})
    assert [code for code, _ in ended] == [2, 2, 2]
    for number, (_, found) in enumerate(ended):
        assert "mine" in found["error"]
        assert (f"worker {rank}" in found["error"]) == (number != rank)


@pytest.mark.parametrize("method", ["exact", "batch", "ema"])
def test_a_worker_that_dies_is_named_and_others_finish_what_was_begun(
    tmp_path: Path, method: str, alone: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"options": {"method": method}, "partial": str(tmp_path / "out.partial")}
    if method == "exact":
        how["again"] = True
    ended = run(tmp_path, 3, {**how, "rank": 2, "at": 8, "end": "kill"})
    assert [code for code, _ in ended] == [2, 2, -signal.SIGKILL]
    for _, found in ended[:2]:
        assert "worker 2 is gone" in found["error"]
        assert "--resume" in found["hint"]
    [(code, found)] = run(tmp_path, 1, how)  # another number of workers, too
    assert code == 0
    assert found == [alone["exact, a layer called twice" if method == "exact" else method]]
    assert not (tmp_path / "out.partial").exists()
