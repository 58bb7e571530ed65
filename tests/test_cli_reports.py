"""What is written: the schema of the JSON, the formats for other programs (golden files), and what a person sees."""

from __future__ import annotations

import copy
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from rich.console import Console

from bnctl.cli.formats import render
from bnctl.cli.options import Format
from bnctl.cli.render import show
from bnctl.cli.tables import MAX_ROWS, short_names, tables
from bnctl.errors import ExitCode
from bnctl.report import Artifact, Report, Site
from conftest import BN, CALIBRATION, INPUT, ONNX_BN, ONNX_PLAIN, TEST, faults, schema
from test_onnx_checks import Net

SHA = "0" * 64
VERIFIED = {
    "samples": 36, "max_abs_error": 1.4e-06, "max_rel_error": 9e-07, "tolerance": 7.9e-05, "passed": True, "reason": None,
    "label_flips": 0, "first_difference": None, "note": None,
}  # fmt: skip
FAILED = VERIFIED | {
    "passed": False, "max_rel_error": 1.87, "max_abs_error": 2.3, "reason": "output 'a|b' differs: relative error 1.87, 100% off", "label_flips": 6,
    "first_difference": {"layer": "layer1.conv1", "max_abs_error": None, "max_rel_error": None, "mismatch": "shapes"},
}  # fmt: skip
FOLD = Report(
    "fold", Artifact("net.onnx", SHA), Artifact("out.onnx", SHA),
    sites=(
        Site("layer1.bn_1", "folded", ("layer1.conv1",)),
        Site("a|b<script>", "left", (), "BN103", "relu (100%) stands\nin the way: see docs, please"),
    ),
    summary={"found": 2, "folded": 1, "left": 1}, verification=VERIFIED, elapsed_s=0.8, notes=("one note",),
)  # fmt: skip
VERIFY = Report(
    "verify", Artifact("a.onnx", SHA), summary={"passed": False}, verification=FAILED, details={"candidate": {"path": "b.onnx", "sha256": SHA}},
    elapsed_s=1.0, exit_code=ExitCode.FAILED,
)  # fmt: skip
CHECK = Report(
    "check", Artifact("net.onnx", SHA), sites=(Site("bn1", "finding", (), "BN401", "can be folded into conv1"),),
    summary={"found": 1, "findings": 1}, exit_code=ExitCode.FAILED,
)  # fmt: skip
LATENCY = {
    "runtime": "onnxruntime", "baseline": "a.onnx", "candidate": "out/b.onnx", "threads": 1, "device": "cpu", "batch": 32, "processes": 5,
    "ratio": 0.972, "ci95": [0.96, 0.984], "noise_floor": 0.017, "p50_ms": {"baseline": 0.194, "candidate": 0.192},
    "p99_ms": {"baseline": 0.263, "candidate": None}, "gated": True,
}  # fmt: skip
ACCURACY = {
    "metric": "top1", "model": "out/b.onnx", "samples": 600, "baseline": 0.99, "candidate": 0.99, "difference": 0.0, "ci95": [-0.0064, 0.0064],
    "discordant": 0, "lost": 0, "gained": 0, "p_value": 1.0,
}  # fmt: skip
GATES = [
    {"expression": "latency.ratio<=1.05", "verdict": "pass", "detail": "out/b.onnx (onnxruntime): ratio 0.9720"},
    {
        "expression": "top1.drop<=0.5",
        "verdict": "inconclusive",
        "detail": "out/b.onnx: top1 drop 0.00 points, 95 % interval [-0.64, 0.64]",
    },
    {"expression": "flips<=0", "verdict": "fail", "detail": "out/b.onnx: 3 of 600"},
]
BENCH = Report(
    "bench", Artifact("a.onnx", SHA), summary={"verdict": "fail", "models": ["a.onnx", "out/b.onnx"]},
    details={
        "verdict": "fail", "candidates": [{"path": "out/b.onnx", "sha256": SHA}], "latency": [LATENCY], "accuracy": [ACCURACY],
        "agreement": [{"model": "out/b.onnx", "samples": 600, "flips": 3}], "gates": GATES,
    },
    elapsed_s=61.0, exit_code=ExitCode.FAILED,
)  # fmt: skip
DRIFT = {"drift": {"mean": 0.38, "max": 0.57}, "self_consistency": 4.5e-08, "channels": 16}
RECALIBRATE = Report(
    "recalibrate", Artifact("net", SHA), sites=(Site("bn1", "recalibrated", details=DRIFT),),
    summary={"found": 1, "recalibrated": 1, "left": 0, "samples": 300, "method": "exact"}, elapsed_s=2.0,
)  # fmt: skip
REPORTS = {"fold": FOLD, "verify": VERIFY, "check": CHECK, "bench": BENCH, "recalibrate": RECALIBRATE}


def shown(report: Report, width: int = 80, *, verbose: bool = False) -> str:
    out = StringIO()
    show(report, Console(file=out, width=width, force_terminal=False), verbose=verbose)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("form", [Format.MARKDOWN, Format.GITHUB, Format.JUNIT])
def test_formats(name, form, golden):
    suffix = {"markdown": "md", "github": "txt", "junit": "xml"}[form]
    golden(f"{name}.{form}.{suffix}", render(REPORTS[name], form))


@pytest.mark.parametrize("name", REPORTS)
def test_what_a_person_sees(name, golden):
    golden(f"{name}.human.txt", shown(REPORTS[name]))


def test_the_golden_switch_compares(golden, request):
    if request.config.getoption("--update-golden"):
        pytest.skip("writing")
    with pytest.raises(AssertionError, match="update-golden"):
        golden("fold.human.txt", shown(FOLD) + "more\n")


@pytest.mark.parametrize("name", REPORTS)
def test_github_annotations_are_one_line_each(name):
    for line in render(REPORTS[name], Format.GITHUB).splitlines():
        assert line.startswith(("::error title=", "::warning title=", "::notice title="))


def test_github_says_error_where_the_command_failed():
    assert "::error title=bnctl bench" in render(BENCH, Format.GITHUB)
    assert "::error" not in render(FOLD, Format.GITHUB)


def test_junit_counts():
    suite = ElementTree.fromstring(render(BENCH, Format.JUNIT))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")


@pytest.mark.parametrize("name", REPORTS)
def test_hand_made_reports_fit_the_schema(name):
    assert faults(REPORTS[name].to_dict()) == []


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("fold", lambda d: d.pop("schema_version")),
        ("fold", lambda d: d.update(schema_version=2)),
        ("fold", lambda d: d.update(command="unfold")),
        ("fold", lambda d: d["summary"].update(folded="1")),
        ("fold", lambda d: d["summary"].update(folded=True)),
        ("fold", lambda d: d["sites"][0].pop("code")),
        ("fold", lambda d: d["sites"][0].update(code="103")),
        ("fold", lambda d: d["source"].update(sha256="abc")),
        ("fold", lambda d: d["verification"].update(passed=None)),
        ("verify", lambda d: d.update(verification=None)),
        ("bench", lambda d: d.update(verdict="maybe")),
        ("bench", lambda d: d["latency"][0]["ci95"].pop()),
        ("bench", lambda d: d["latency"][0]["p50_ms"].pop("baseline")),
        ("recalibrate", lambda d: d["sites"][0].pop("drift")),
    ],
)
def test_the_schema_sees_what_is_wrong(name, spoil):
    document = copy.deepcopy(REPORTS[name].to_dict())
    spoil(document)
    assert faults(document)


def test_the_schema_refers_to_what_it_defines():
    def references(rule):
        if isinstance(rule, dict):
            for key, value in rule.items():
                yield from [value] if key == "$ref" else references(value)
        elif isinstance(rule, list):
            for item in rule:
                yield from references(item)

    assert {ref.removeprefix("#/$defs/") for ref in references(schema())} == schema()["$defs"].keys()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ("inspect", ONNX_BN)),
        (0, ("fold", ONNX_BN, "-o", "out.onnx")),
        (0, ("fold", ONNX_PLAIN, "-o", "out.onnx")),
        (0, ("insert", ONNX_PLAIN, "-o", "out.onnx", "--data", CALIBRATION)),
        (0, ("recalibrate", BN, "-o", "out", "--data", CALIBRATION)),
        (0, ("export", BN, "-o", "out.onnx", "--keep-bn", "--input", INPUT)),
        (0, ("export", BN, "-o", "out.onnx", "--input", INPUT)),
        (0, ("export", ONNX_BN, "-o", "out.onnx")),
        (0, ("verify", ONNX_BN, ONNX_BN, "--data", TEST)),
        (1, ("verify", ONNX_BN, ONNX_PLAIN)),
        (1, ("check", ONNX_BN)),
        (0, ("bench", ONNX_BN, ONNX_PLAIN, "--data", TEST, "--no-latency")),
        (0, ("bench", ONNX_BN, ONNX_BN, "--data", TEST, "--no-accuracy", "--processes", "2", "--max-processes", "2", "--batch-size", "4")),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value[:5]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_json_of_every_command(code, words, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = cli(*words, "--json", "--quiet")
    assert ended.code == code, ended.err
    assert faults(ended.document) == []
    assert ended.document["command"] == words[0]
    assert ended.err == ""


@pytest.mark.parametrize("command", ["inspect", "check", "fold"])
def test_statistics_that_are_not_finite(command, cli, tmp_path, monkeypatch):
    """NaN is no JSON: null stands for it."""
    monkeypatch.chdir(tmp_path)
    model = onnx.load(ONNX_BN)
    node = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    mean = next(i for i in model.graph.initializer if i.name == node.input[3])
    mean.CopyFrom(onnx.numpy_helper.from_array(np.full(mean.dims, np.nan, np.float32), mean.name))
    onnx.save(model, "nan.onnx")
    ended = cli(command, "nan.onnx", "--json", *(["--dry-run"] if command == "fold" else []))
    assert ended.code == (1 if command == "check" else 0), ended.err
    assert faults(ended.document) == []
    assert "BN115" in [site["code"] for site in ended.document["sites"]]


def test_quiet_leaves_the_exit_code(cli):
    ended = cli("check", ONNX_BN, "--quiet")
    assert (ended.code, ended.out, ended.err) == (1, "", "")


def test_formats_on_the_command_line(cli):
    assert cli("check", ONNX_BN, "--format", "markdown").out.startswith("### bnctl check\n")
    assert cli("check", ONNX_BN, "--format=github").out.count("::warning title=bnctl BN401::") == 5
    assert ElementTree.fromstring(cli("check", ONNX_BN, "--format", "junit").out).get("failures") == "5"
    assert cli("check", ONNX_BN, "--format", "json").document["command"] == "check"


def test_the_verdict_is_one_line(cli):
    assert "verify: FAILED" in cli("verify", ONNX_BN, ONNX_PLAIN).out
    assert "verify: passed" in cli("verify", ONNX_BN, ONNX_BN).out
    assert "check: 5 found · 5 findings" in cli("check", ONNX_BN).out


def many(*tail: Site) -> Report:
    sites = tuple(Site(f"layer{n}", "folded", ("conv",)) for n in range(MAX_ROWS))
    return Report("fold", sites=(*sites, *tail), summary={"found": len(sites) + len(tail)})


def test_long_tables_show_what_needs_a_look():
    left = Site("last", "left", (), "BN103", "a relu")
    [table] = tables(many(left))
    assert table.columns[0].cells == ["last"]
    assert f"{MAX_ROWS} more" in table.rest
    [whole] = tables(many(left), verbose=True)
    assert len(whole.columns[0].cells) == MAX_ROWS + 1
    assert "layer" not in shown(many(Site("last", "folded"))).partition("more")[0], "nothing needs a look: counts only"


def test_long_reasons_are_cut():
    report = Report("fold", sites=(Site("bn", "left", (), "BN101", "read by " + "layer, " * 99 + "end"),))
    assert "end" not in shown(report)
    assert "end" in shown(report, verbose=True)
    assert "end" in report.to_dict()["sites"][0]["reason"]


def test_long_tables_of_drift_begin_with_the_largest():
    sites = [
        Site(f"bn{n}", "recalibrated", details={"drift": {"mean": n, "max": float(n)}}) for n in range(MAX_ROWS + 9)
    ]
    [table] = tables(Report("recalibrate", sites=tuple(sites)))
    assert table.columns[0].cells[:2] == [f"bn{MAX_ROWS + 8}", f"bn{MAX_ROWS + 7}"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_wider_than_the_terminal(name, width):
    assert max(map(len, shown(REPORTS[name], width).splitlines())) <= width


@pytest.mark.parametrize("width", [20, 40, 60])
@pytest.mark.parametrize("name", REPORTS)
def test_a_narrow_terminal_cuts_no_figures(name, width):
    text = shown(REPORTS[name], width)
    for table in tables(REPORTS[name]):
        for column in table.columns:
            if not column.wraps:
                assert all(cell in text for cell in (column.heading, *column.cells))
        if table.columns[0].heading == "layer":
            assert all(cell[:12] in text for cell in table.columns[0].cells)


def test_a_long_path_is_not_wrapped():
    path = "/a/very/long/path" * 10 + "/out.onnx"
    assert f"wrote {path}\n" in shown(Report("fold", output=Artifact(path)))


def test_short_names_stay_apart():
    assert short_names(["a/x.onnx", "b/y.onnx", "m.n:f@w/w.safetensors"]) == {
        "a/x.onnx": "x.onnx", "b/y.onnx": "y.onnx", "m.n:f@w/w.safetensors": "m.n:f"
    }  # fmt: skip
    assert set(short_names(["a/x.onnx", "b/x.onnx"]).values()) == {"a/x.onnx", "b/x.onnx"}
    assert short_names(["x.onnx", "x.onnx"]) == {"x.onnx": "x.onnx"}


@pytest.mark.parametrize("form", ["junit", "markdown", "github", "human"])
def test_control_characters_of_a_name_are_written_out(form, cli, tmp_path, monkeypatch):
    net = Net("N", 3, 8, 8)
    net.bn(net.conv("x", 3, 4), 4, out="boom\x1b[31m\x00\x9b<script>")
    onnx.save(net.proto("boom\x1b[31m\x00\x9b<script>"), tmp_path / "m.onnx")
    ended = cli("check", tmp_path / "m.onnx", "--format", form)
    assert ended.code == 1
    assert not set(ended.out) & {"\x1b", "\x00", "\x9b"}
    if form == "junit":
        cases = ElementTree.fromstring(ended.out).findall("testcase")
        assert any("boom\\x1b[31m" in str(case.get("name")) for case in cases)
    elif form != "human":
        assert "boom\\" in ended.out
    error = cli("inspect", tmp_path / "no\x1b[31m.onnx")
    assert error.code == 2 and "\x1b" not in error.err
