"""What tests of the command line share: running it in this process, and the schema of reports."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bnctl
from bnctl.cli.app import run
from bnctl.errors import ExitCode
from bnctl.fixture import fixture_path

PLAIN = f"bnctl.fixture:plain@{fixture_path('digits_plain.safetensors')}"
BN = f"bnctl.fixture:with_bn@{fixture_path('digits_bn.safetensors')}"
ONNX_BN, ONNX_PLAIN = str(fixture_path("digits_bn.onnx")), str(fixture_path("digits_plain.onnx"))
CALIBRATION, TEST = str(fixture_path("calibration.npz")), str(fixture_path("test.npz"))
INPUT = "2x1x8x8"
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""What a process that is to be interrupted does first: one that a shell started in the background has inherited deafness."""
MAIN = HEARING + "from bnctl.cli.app import main; main()"
_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "integer": int, "number": (int, float)
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; anything else there is an error, NaN too."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command line in this process; no traceback may reach the user."""
    for name in ("BNCTL_TRACEBACK", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str | Path) -> Ended:
        capsys.readouterr()
        code = run([str(word) for word in words])
        ended = Ended(code, *capsys.readouterr())
        assert "Traceback" not in ended.err + ended.out
        return ended

    return call


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny, and threads that wait for each other on a busy machine make the tests ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def probe_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recalibration by `batch` and `ema` measures itself on every batch."""
    from bnctl.engines.torch.recalibration import run, schedules

    for module in (run, schedules):
        monkeypatch.setattr(module, "PROBE", 1)


@cache
def schema() -> dict[str, Any]:
    """The schema that ships with the package."""
    return json.loads(Path(bnctl.__file__).with_name("report.schema.json").read_text())  # type: ignore[no-any-return]


def faults(value: Any, rule: dict[str, Any] | None = None, at: str = "$") -> list[str]:
    """Where a value breaks a JSON schema, for the keywords that ours uses; others are refused."""
    rule = schema() if rule is None else rule
    found: list[str] = []
    for keyword, wanted in rule.items():
        match keyword:
            case "$schema" | "title" | "description" | "$defs":
                pass
            case "$ref":
                found += faults(value, schema()["$defs"][wanted.removeprefix("#/$defs/")], at)
            case "allOf":
                found += [fault for part in wanted for fault in faults(value, part, at)]
            case "anyOf":
                found += _none_of([faults(value, part, at) for part in wanted], at)
            case "type":
                types = [wanted] if isinstance(wanted, str) else wanted
                if not any(_is(value, name) for name in types):
                    found.append(f"{at}: {value!r} is no {' or '.join(types)}")
            case "required":
                found += [f"{at}: no {key!r}" for key in wanted if isinstance(value, dict) and key not in value]
            case "properties":
                if isinstance(value, dict):
                    found += [
                        f
                        for key, part in wanted.items()
                        if key in value
                        for f in faults(value[key], part, f"{at}.{key}")
                    ]
            case "items":
                if isinstance(value, list):
                    found += [f for index, item in enumerate(value) for f in faults(item, wanted, f"{at}[{index}]")]
            case "enum" | "const":
                if value not in (wanted if keyword == "enum" else [wanted]):
                    found.append(f"{at}: {value!r} is not {wanted!r}")
            case "pattern":
                if isinstance(value, str) and not re.search(wanted, value):
                    found.append(f"{at}: {value!r} does not match {wanted}")
            case "minItems" | "maxItems":
                if isinstance(value, list) and (len(value) < wanted if keyword == "minItems" else len(value) > wanted):
                    found.append(f"{at}: {len(value)} items")
            case _:
                raise AssertionError(f"the schema uses {keyword!r}, which this validator does not know")
    return found


def _none_of(branches: list[list[str]], at: str) -> list[str]:
    """The faults of the branch that comes nearest, if no branch fits."""
    return [] if any(not b for b in branches) else [f"{at}: no alternative fits", *min(branches, key=len)]


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is produced now into tests/golden")


@pytest.fixture
def golden(request):
    """Compare a text with a file of tests/golden; `pytest --update-golden` writes it."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).with_name("golden") / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; if that is meant: pytest --update-golden"

    return compare


def stopped(run: subprocess.Popen[str], partial: Path, how: signal.Signals) -> str:
    """Stop a recalibration as soon as it has kept something; what it said."""
    deadline = time.monotonic() + 100
    while not partial.exists():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(how)
    _, error = run.communicate(timeout=60)
    assert run.returncode == (ExitCode.INTERRUPTED if how is signal.SIGINT else -how)
    assert "Traceback" not in error
    return error
