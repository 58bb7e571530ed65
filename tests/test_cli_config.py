"""Settings: flags beat the environment, which beats the file; what is not understood is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import CALIBRATION, INPUT, ONNX_BN, ONNX_PLAIN, PLAIN, TEST

GATED = ("bench", ONNX_BN, ONNX_PLAIN, "--no-latency", "--data", TEST)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def samples(cli):
    """How many samples an insertion saw: what `--limit` was."""

    def call(*words: str) -> int:
        ended = cli("insert", ONNX_PLAIN, "-o", "out.onnx", "--force", "--json", "--data", CALIBRATION, *words)
        assert ended.code == 0, ended.err
        return ended.document["summary"]["samples"]

    return call


@pytest.mark.parametrize(
    ("name", "text"), [("pyproject.toml", "[tool.bnctl]\nlimit = 7\n"), ("bnctl.toml", "limit = 7\n")]
)
def test_flags_beat_environment_beats_file(name, text, samples, monkeypatch):
    assert samples() == 300
    Path(name).write_text(text)
    assert samples() == 7
    Path(name).write_text(text + ("[tool.bnctl.insert]" if "tool" in text else "[insert]") + "\nlimit = 8\n")
    assert samples() == 8
    monkeypatch.setenv("BNCTL_LIMIT", "9")
    assert samples() == 9
    monkeypatch.setenv("BNCTL_INSERT_LIMIT", "10")
    assert samples() == 10
    assert samples("--limit", "11") == 11


def test_the_nearest_file_upwards_counts(samples, folder, monkeypatch):
    (folder / "bnctl.toml").write_text("limit = 7\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    monkeypatch.chdir(folder / "sub")
    assert samples() == 7


@pytest.mark.parametrize("gate", ['"flips<=0"', '["flips<=0"]'])
def test_a_repeatable_option_as_a_word_or_a_list(gate, cli):
    Path("bnctl.toml").write_text(f"[bench]\ngate = {gate}\n")
    assert cli(*GATED).code == 1


def test_gates_from_the_environment(cli, monkeypatch):
    monkeypatch.setenv("BNCTL_BENCH_GATE", "flips<=0 top1.drop<=90")
    ended = cli(*GATED, "--json")
    assert [g["verdict"] for g in ended.document["gates"]] == ["fail", "pass"]


@pytest.mark.parametrize("where", ["file", "environment"])
def test_json_asked_for_elsewhere_holds_for_errors_too(where, cli, monkeypatch):
    if where == "file":
        Path("bnctl.toml").write_text('format = "json"\n')
    else:
        monkeypatch.setenv("BNCTL_FORMAT", "json")
    assert cli("inspect", ONNX_BN).document["command"] == "inspect"
    assert cli("inspect", "missing.onnx").document["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limti = 3", "limti"),
        ("[fold]\nkeep-bn = true", "keep-bn"),
        ("[unfold]\nlimit = 3", "unfold"),
        ("model = 'x.onnx'", "model"),
        ("limit = 'many'", "limit"),
        ("limit = [1, 2]", "limit"),
        ("limit = 0", "limit"),
        ("device = 'abacus'", "abacus"),
        ("trusted-factories = 'a:*'", "trusted-factories"),
        ("trusted-factories = [1]", "trusted-factories"),
        ("limit = ", "bnctl.toml"),
        ("batch-size = true", "batch-size = true"),
        ("batch-size = 3\nbatch_size = 4", "the same setting"),
        ("[inspect]\nbatch-size = 3\nbatch_size = 4", "the same setting"),
        ("seed = -1", "seed"),
        ("seed = 99999999999999999999999", "seed"),
    ],
)
def test_what_is_not_understood_is_refused(text, said, cli):
    Path("bnctl.toml").write_text(text)
    ended = cli("inspect", ONNX_BN, "--json")
    assert ended.code == 2
    assert said in ended.err
    assert ended.document["error"]["hint"]


def test_a_value_of_the_environment_is_checked(cli, monkeypatch):
    monkeypatch.setenv("BNCTL_BATCH_SIZE", "many")
    ended = cli("inspect", ONNX_BN)
    assert ended.code == 2
    assert "--batch-size" in ended.err
    assert "the value is from the environment variable BNCTL_BATCH_SIZE" in " ".join(ended.err.split())
    assert "environment" not in cli("inspect", ONNX_BN, "--batch-size", "few").err


@pytest.mark.parametrize("text", ["threads = 'two'", "[inspect]\nthreads = 'two'"])
def test_a_wrong_value_of_a_file_is_said_to_be_from_there(text, cli):
    Path("bnctl.toml").write_text(text)
    ended = cli("inspect", ONNX_BN)
    assert ended.code == 2
    assert "--threads" in ended.err
    assert "bnctl.toml" in ended.err
    assert "bnctl.toml" not in cli("inspect", ONNX_BN, "--limit", "x").err


def test_a_misspelt_variable_is_refused(cli, monkeypatch):
    monkeypatch.setenv("BNCTL_MY_OWN_THING", "1")
    assert cli("inspect", ONNX_BN).code == 0
    monkeypatch.setenv("BNCTL_TOLERENCE", "1e-12")
    ended = cli("inspect", ONNX_BN)
    assert ended.code == 2
    assert "BNCTL_TOLERENCE" in ended.err
    assert "did you mean BNCTL_TOLERANCE?" in ended.err


def test_trust(cli, folder):
    """A bundle from elsewhere builds with its factory only where somebody vouches for it."""
    (folder / "trust_nets.py").write_text("from bnctl.fixture import plain\ndef build(): return plain()\n")
    weights = PLAIN.partition("@")[2]
    assert cli("insert", f"trust_nets:build@{weights}", "-o", "mine", "--data", CALIBRATION).code == 0
    shutil.copytree("mine", "theirs")
    document = json.loads(Path("theirs/bnctl.json").read_text())
    Path("theirs/bnctl.json").write_text(json.dumps(document | {"source": {"path": "elsewhere", "sha256": None}}))
    inspect = ("inspect", "theirs", "--input", INPUT)
    assert cli(*inspect).code == 2
    assert cli(*inspect, "--trust").code == 0
    assert cli(*inspect, "--factory", "trust_nets:build").code == 0
    Path("bnctl.toml").write_text('trusted-factories = ["other_nets:*"]\n')
    assert cli(*inspect).code == 2
    Path("bnctl.toml").write_text('trusted-factories = ["trust_nets:*"]\n')
    assert cli(*inspect).code == 0


@pytest.mark.parametrize("text", ["tool = 1", "tool = [1]", "[tool]\nbnctl = 1"])
def test_a_project_file_without_tables_where_they_are_looked_for(text, cli):
    Path("pyproject.toml").write_text(text)
    ended = cli("inspect", ONNX_BN)
    assert ended.code == 2
    assert "is not a table" in ended.err


@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_format_on_the_command_line_beats_json_asked_for_elsewhere(where, cli, monkeypatch):
    if where == "file":
        Path("bnctl.toml").write_text("json = true\n")
    else:
        monkeypatch.setenv("BNCTL_JSON", "1")
    assert cli("inspect", ONNX_BN).document["command"] == "inspect"
    assert cli("inspect", ONNX_BN, "--format", "markdown").out.startswith("### bnctl inspect")
    assert cli("inspect", ONNX_BN, "--format", "json").document["command"] == "inspect"


def test_json_and_another_format_at_once_are_refused(cli):
    assert cli("inspect", ONNX_BN, "--json", "--format", "json").code == 0
    ended = cli("inspect", ONNX_BN, "--json", "--format", "markdown")
    assert ended.code == 2
    assert "contradict" in ended.err
    Path("bnctl.toml").write_text('json = true\nformat = "junit"\n')
    assert cli("inspect", ONNX_BN).code == 2
    assert cli("inspect", ONNX_BN, "--format", "markdown").out.startswith("### bnctl inspect")


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999999"])
def test_a_seed_out_of_range_is_refused(seed, cli):
    assert cli("verify", ONNX_BN, ONNX_BN, "--seed", seed).code == 2
