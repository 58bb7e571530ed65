"""Reason codes: one table, which the source and `bnctl explain` agree on; and errors that all name a next step."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bnctl
from bnctl.codes import CODES

SOURCE = Path(bnctl.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ERRORS = {
    "UsageError",
    "InputError",
    "ModelError",
    "DataError",
    "UntrustedError",
    "OverflowInFoldError",
    "EquivalenceError",
}


def codes_in(text: str) -> set[str]:
    return set(re.findall(r"\bBN[1-9][0-9]{2}\b", text))


def without_hint(text: str) -> list[int]:
    """Lines that make an error without a next step."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [c.lineno for c in calls if c.func.id in ERRORS and not any(k.arg in ("hint", None) for k in c.keywords)]


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.id)
def test_every_code_says_what_why_and_what_to_do(code, cli):
    assert code.title
    assert len(code.why) > 20
    assert code.remedy.endswith(".")
    ended = cli("explain", code.id.lower())
    assert ended.code == 0
    assert code.title in ended.out
    assert "What to do:" in ended.out
    if code.example:
        assert code.example.splitlines()[-1].strip()[:40] in ended.out


def test_the_list_has_all(cli):
    ended = cli("explain")
    assert codes_in(ended.out) == CODES.keys()
    assert len(ended.out.splitlines()) == len(CODES)


def test_the_table_and_the_source_agree():
    used = set().union(*(codes_in(f.read_text()) for f in FILES if f.parent.name != "codes"))
    assert used - CODES.keys() == set(), "codes that explain does not know"
    assert CODES.keys() - used == set(), "codes that nothing raises"


def codes_left(example: str) -> set[str]:
    """Codes of the sites that folding leaves in an example: ONNX text, or torch code that builds ``model`` and ``x``."""
    import onnx
    import torch

    if example.startswith("<ir_version"):
        report = bnctl.fold(onnx.parser.parse_model(example)).report
    else:
        names = {"torch": torch, "nn": torch.nn, "functional": torch.nn.functional}
        exec(example, names)
        report = bnctl.fold(names["model"].eval(), names["x"]).report
    return {site.code for site in report.sites if site.code is not None}


NOT_EXECUTED = {
    "BN121": "it takes calibration data that go another way than the --input",
    "BN122": "it takes an option; test_fold_options has it",
}


@pytest.mark.parametrize("code", [c for c in CODES if c.startswith("BN1") and c not in NOT_EXECUTED])
def test_the_examples_are_true(code):
    assert code in codes_left(CODES[code].example)


def test_negative_control_an_example_that_leaves_nothing():
    assert (
        codes_left("model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8)") == set()
    )


def test_every_fold_code_has_an_example():
    assert [c for c in CODES if c.startswith("BN1") and not CODES[c].example] == []


def test_codes_are_found_in_text():
    assert codes_in('code="BN101", BN999 and BN9999, ABN101') == {"BN101", "BN999"}


def test_unknown_codes_come_with_near_ones(cli):
    ended = cli("explain", "BN1011")
    assert ended.code == 2
    assert "did you mean" in ended.err


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_error_names_the_next_step(path):
    assert without_hint(path.read_text()) == []


def test_errors_without_hint_are_found():
    assert without_hint('raise UsageError("no")\nraise UsageError("no", hint="do")') == [1]


def test_a_code_as_json(cli):
    ended = cli("explain", "bn101", "--json")
    assert ended.code == 0
    assert [code["id"] for code in ended.document["codes"]] == ["BN101"]
    assert ended.document["codes"][0]["remedy"] == CODES["BN101"].remedy
    assert len(cli("explain", "--json").document["codes"]) == len(CODES)
    assert cli("explain", "BN999", "--json").document["error"]["exit_code"] == 2
