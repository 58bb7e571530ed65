"""Every form of MODEL, of `--data` and of `-o`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from conftest import BN, CALIBRATION, INPUT, ONNX_BN, PLAIN, TEST, faults

WEIGHTS = BN.partition("@")[2]
NETS = """
import numpy as np
import torch
from torch import nn

def wide(width=4, *, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3, bias=bias), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)).eval()

def batches():
    generator = np.random.default_rng(0)
    for size in (4, 4, 2):
        yield torch.from_numpy(generator.normal(size=(size, 1, 8, 8)).astype("float32"))

def labelled():
    return [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches()]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "form_nets", raising=False)
    Path("form_nets.py").write_text(NETS)
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The fixture's net with BN in every form that can be read."""
    from bnctl.cli.app import run

    folder = tmp_path_factory.mktemp("written")
    external = onnx.load(ONNX_BN)
    onnx.save(external, folder / "external.onnx", save_as_external_data=True, location="external.bin", size_threshold=0)
    for name in ("bundle", "net.pt2"):
        words = ["recalibrate", BN, "-o", str(folder / name), "--data", CALIBRATION, "--quiet"]
        assert run(words) == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        (ONNX_BN,),
        ("external.onnx",),
        ("net.pt2", "--input", INPUT),
        ("bundle", "--input", INPUT),
        (BN, "--input", INPUT),
        ("bnctl.fixture:with_bn", "--weights", WEIGHTS, "--input", INPUT),
    ],
    ids=["onnx", "external data", "pt2", "bundle", "factory@weights", "--weights"],
)
def test_every_form_of_model(words, cli, written, monkeypatch):
    monkeypatch.chdir(written)
    ended = cli("inspect", *words, "--json")
    assert ended.code == 0, ended.err
    assert faults(ended.document) == []
    assert ended.document["summary"]["foldable"] == 5
    assert len(ended.document["source"]["sha256"]) == 64


def test_model_arguments(cli):
    ended = cli(
        "inspect", "form_nets:wide", "--model-arg", "width=6", "--model-arg", "bias=false", "--input", INPUT, "--json"
    )
    assert ended.document["sites"][0]["channels"] == 6
    assert cli("fold", "form_nets:wide", "--model-arg", "width=6", "-o", "six", "--input", INPUT).code == 0
    again = cli("inspect", "six", "--input", INPUT, "--json")
    assert again.document["summary"]["found"] == 0, "the bundle remembers its arguments"


@pytest.mark.parametrize("output", ["out.onnx", "out.pt2", "out"])
@pytest.mark.parametrize("command", ["fold", "insert", "recalibrate"])
def test_every_form_of_output(command, output, cli):
    source = PLAIN if command == "insert" else BN
    words = [command, source, "-o", output, "--data", CALIBRATION, "--limit", "20", "--json"]
    ended = cli(*words)
    assert ended.code == 0, ended.err
    assert faults(ended.document) == []
    assert ended.document["output"]["path"] == output
    assert Path(output).is_dir() == (output == "out")
    if command == "fold":
        check = cli("verify", BN, output, "--data", TEST, "--limit", "20")
        assert check.code == 0, check.err + check.out
    else:
        assert cli("inspect", output, "--input", INPUT, "--json").document["summary"]["found"] == 5
    before = _bytes()
    again = cli(*words)
    assert again.code == 2
    assert "--force" in again.document["error"]["hint"]
    assert _bytes() == before
    assert cli(*words, "--force").code == 0


def _bytes():
    return {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.parametrize("command", ["fold", "insert", "recalibrate", "export"])
@pytest.mark.parametrize("output", [(), ("-o", "out")])
def test_a_dry_run_writes_nothing(command, output, cli):
    before = _bytes()
    ended = cli(
        command, PLAIN if command == "insert" else BN, "--dry-run", "--data", CALIBRATION, "--limit", "20", "--json"
    )
    assert ended.code == 0, ended.err
    assert ended.document["output"] is None
    assert ended.document["sites"]
    assert _bytes() == before


@pytest.mark.parametrize(
    ("word", "samples"),
    [
        ((CALIBRATION,), 300),
        ((CALIBRATION, "--limit", "50"), 50),
        (("form_nets:batches",), 10),
        (("form_nets:labelled",), 10),
        (("random:24", "--input", "1x1x8x8"), 24),
        (("images", "--preprocess", "grey.json"), 6),
    ],
    ids=["npz", "limit", "loader", "labelled loader", "random", "folder"],
)
def test_every_form_of_data(word, samples, cli):
    Path("grey.json").write_text('{"channels": "L", "mean": [0.5], "std": [0.5]}')
    for label in ("cat", "dog"):
        Path("images", label).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)).save(
                f"images/{label}/{number}.png"
            )
    ended = cli("insert", PLAIN, "-o", "out", "--json", "--data", *word)
    assert ended.code == 0, ended.err
    assert ended.document["summary"] == {"found": 6, "inserted": 5, "left": 1, "samples": samples}


def test_the_seed_decides_synthetic_data(cli):
    def drift(seed):
        words = [
            "recalibrate",
            BN,
            "--dry-run",
            "--json",
            "--data",
            "random:16",
            "--input",
            "1x1x8x8",
            "--seed",
            str(seed),
        ]
        return [site["drift"] for site in cli(*words).document["sites"]]

    assert drift(1) == drift(1)
    assert drift(1) != drift(2)


def test_weights_go_to_the_factory_beside_a_file(cli):
    plain = PLAIN.partition("@")
    ended = cli("verify", plain[0], ONNX_BN, "--weights", plain[2], "--input", INPUT)
    assert ended.code == 1, ended.err
    ended = cli("verify", "bnctl.fixture:with_bn", ONNX_BN, "--weights", WEIGHTS, "--input", INPUT)
    assert ended.code == 0, ended.err


def test_models_of_both_kinds_in_one_bench(cli, written):
    words = ["bnctl.fixture:with_bn", str(written / "bundle"), ONNX_BN]
    ended = cli("bench", *words, "--weights", WEIGHTS, "--data", TEST, "--limit", "50", "--no-latency", "--json")
    assert ended.code == 0, ended.err
    assert faults(ended.document) == []
    assert [a["path"] for a in ended.document["candidates"]] == words[1:]
    assert all(a["sha256"] for a in (ended.document["source"], *ended.document["candidates"]))
    assert {row["model"]: row["flips"] for row in ended.document["agreement"]}[ONNX_BN] == 0
