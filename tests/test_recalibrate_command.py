"""`bnctl recalibrate` as a user meets it: the guard, transforms, interruptions, torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnctl.commands import guard
from bnctl.data.batches import Batch, located
from bnctl.data.holdout import hold_out
from bnctl.errors import ExitCode
from bnctl.fixture import fixture_path
from conftest import MAIN, stopped

BN = f"bnctl.fixture:with_bn@{fixture_path('digits_bn.safetensors')}"
TEST, SHIFTED = (str(fixture_path(f"{name}.npz")) for name in ("test", "shifted"))
UNLABELLED = "unlabelled.npz"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with np.load(fixture_path("shifted_calibration.npz")) as arrays:
        np.savez(UNLABELLED, x=arrays["x"])


def report(cli: Any, *words: str) -> Any:
    ended = cli("recalibrate", BN, *words, "--json")
    document = json.loads(ended.out)
    document["code"] = ended.code
    return document


def spoilt() -> str:
    """Images that have little to do with those of the test: recalibrating on them hurts."""
    with np.load(TEST) as arrays:
        x, y = arrays["x"], arrays["y"]
    generator = np.random.default_rng(0)
    worse = np.where(generator.random(x.shape) < 0.5, generator.random(x.shape) * 30, 0).astype(x.dtype)
    places = located(len(x), len(x), lambda steps: (Batch((np.arange(len(x)),)) for _ in steps))
    held_out = np.concatenate([batch.args[0] for batch in hold_out(places, 5)[1]])
    worse[held_out] = x[held_out]  # these judge
    np.savez("spoilt.npz", x=worse, y=y)
    return "spoilt.npz"


# ---- guard


def test_labelled_data_are_judged_on_samples_that_were_not_used(cli: Any) -> None:
    with np.load(SHIFTED) as arrays:
        samples = len(arrays["x"])
    found = report(cli, "--data", SHIFTED, "-o", "out", "--max-drop", "1")
    assert found["code"] == ExitCode.OK
    assert found["verdict"] == "pass"
    held_out = samples // 5
    assert found["accuracy"][0]["samples"] == held_out
    assert found["summary"]["samples"] == samples - held_out
    assert found["accuracy"][0]["difference"] > 0.05
    assert Path("out").is_dir()


def test_a_result_that_hurts_is_not_written(cli: Any) -> None:
    found = report(cli, "--data", spoilt(), "-o", "out", "--max-drop", "1")
    assert found["code"] == ExitCode.FAILED
    assert found["verdict"] == "fail"
    assert found["output"] is None
    assert not Path("out").exists()
    assert not Path("out.partial").exists()
    assert any("nothing was written" in note for note in found["notes"])


def test_without_a_limit_a_result_that_hurts_is_written_with_a_warning(cli: Any) -> None:
    found = report(cli, "--data", spoilt(), "-o", "out")
    assert found["code"] == ExitCode.OK
    assert any("do not ship this" in note for note in found["notes"])
    assert Path("out").is_dir()


def test_too_few_samples_to_tell_are_inconclusive(cli: Any) -> None:
    found = report(cli, "--data", TEST, "-o", "out", "--max-drop", "0.01", "--limit", "60")
    assert found["code"] == ExitCode.INCONCLUSIVE
    assert not Path("out").exists()


def test_the_limit_needs_labels(cli: Any) -> None:
    ended = cli("recalibrate", BN, "--data", UNLABELLED, "-o", "out", "--max-drop", "1")
    assert ended.code == ExitCode.USAGE
    assert "no labels" in ended.err
    ended = cli("recalibrate", BN, "--data", TEST, "-o", "out", "--max-drop", "1", "--hold-out", "0")
    assert ended.code == ExitCode.USAGE
    assert "--hold-out is 0" in ended.err
    assert cli("recalibrate", BN, "--data", TEST, "-o", "out", "--hold-out", "1").code == ExitCode.USAGE


def test_without_labels_all_samples_are_used(cli: Any) -> None:
    found = report(cli, "--data", UNLABELLED, "-o", "out")
    with np.load(UNLABELLED) as arrays:
        assert found["summary"]["samples"] == len(arrays["x"])
    assert "accuracy" not in found
    assert any("bnctl bench" in note for note in found["notes"])


def test_the_best_prior_is_chosen_by_accuracy(cli: Any) -> None:
    """On images of which recalibration hurts the largest prior wins, and it is judged on other samples than it was chosen by."""
    found = report(cli, "--data", spoilt(), "-o", "out", "--prior", "auto")
    tried = {entry["prior"]: entry["accuracy"] for entry in found["priors"]}
    assert len(tried) == 6
    assert found["summary"]["prior"] == max(tried, key=lambda prior: (tried[prior], prior)) > 0
    with np.load(TEST) as arrays:
        held_out = len(arrays["x"]) // 5
    assert found["accuracy"][0]["samples"] == held_out // 2


def test_the_gate_does_not_rest_on_an_output_that_may_be_another(cli: Any) -> None:
    Path("two.py").write_text(
        "from bnctl.fixture import with_bn\n"
        "class Two(type(with_bn())):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return y * 0, y\n"
        "def build():\n"
        "    return Two()\n"
    )
    model = f"two:build@{fixture_path('digits_bn.safetensors')}"
    ended = cli("recalibrate", model, "--data", TEST, "-o", "out", "--max-drop", "1", "--trust")
    assert ended.code == ExitCode.USAGE
    assert "look like class scores" in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("words", [("--max-drop", "nan"), ("--max-drop", "1", "--hold-out", "5000")])
def test_a_gate_that_cannot_be_judged_is_refused_before_any_work(
    cli: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnctl.commands.recalibrate.on_engine", lambda *_: pytest.fail("it worked"))
    assert cli("recalibrate", BN, "--data", TEST, "-o", "out", *words).code == ExitCode.USAGE


def test_a_loader_that_shuffles_gives_the_judge_what_was_not_used(cli: Any) -> None:
    """Each sample has its number in a corner, and the transform notes the ones that are used, the model the ones that judge."""
    Path("shuffling.py").write_text(
        "import numpy as np\n"
        "from bnctl.fixture import fixture_path\n"
        "used = set()\n"
        "def shuffled():\n"
        "    with np.load(fixture_path('test.npz')) as arrays:\n"
        "        x, y = arrays['x'].copy(), arrays['y']\n"
        "    x[:, 0, 0, 0] = np.arange(len(x)) / 1000\n"
        "    order = np.random.permutation(len(x))\n"
        "    return [(x[part], y[part]) for part in np.array_split(order, 20)]\n"
        "def noting(x):\n"
        "    used.add(round(float(x[0, 0, 0]) * 1000))\n"
        "    return x\n"
    )
    judged: set[int] = set()
    before = guard.judge

    def watching(model: Any, new: Any, held_out: Any, limit: Any) -> Any:
        judged.update(round(float(v) * 1000) for batch in held_out for v in batch.args[0][:, 0, 0, 0])
        return before(model, new, held_out, limit)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(guard, "judge", watching)
        assert (
            cli("recalibrate", BN, "--data", "shuffling:shuffled", "--augment", "shuffling:noting", "-o", "out").code
            == 0
        )
    import shuffling  # type: ignore[import-not-found]

    assert len(shuffling.used) == 480
    assert len(judged) == 120
    assert not judged & shuffling.used


# ---- doubts


def flat(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def test_a_model_that_keeps_something_from_call_to_call_is_doubted(cli: Any) -> None:
    Path("counting.py").write_text(
        "import torch\n"
        "class Counting(torch.nn.Module):\n"
        "    calls = 0\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.bn = torch.nn.BatchNorm2d(1)\n"
        "    def forward(self, x):\n"
        "        Counting.calls += 1\n"
        "        return self.bn(x * Counting.calls)\n"
    )
    words = ("--data", UNLABELLED, "--trust", "--dry-run", "--memory", "0")
    ended = cli("recalibrate", "counting:Counting", *words)
    assert ended.code == 0, ended.err
    assert "the model keeps something from call to call, or draws random numbers" in flat(ended.out)
    assert "from call to call" not in flat(cli("recalibrate", BN, *words).out)


def test_statistics_that_move_far_are_doubted(cli: Any) -> None:
    with np.load(UNLABELLED) as arrays:
        np.savez("bright.npz", x=arrays["x"].astype(np.float32) * 100)
    for data, far in (("bright.npz", True), (UNLABELLED, False)):
        out = flat(cli("recalibrate", BN, "--data", data, "--dry-run").out)
        assert ("are the data preprocessed as in training?" in out) == far


# ---- transforms


def test_a_transform_changes_what_is_recalibrated_on_and_not_what_judges(cli: Any) -> None:
    Path("mine.py").write_text("def darker(x):\n    return x * 0.2\n")
    plain = report(cli, "--data", TEST, "-o", "plain")
    dark = report(cli, "--data", TEST, "-o", "dark", "--augment", "mine:darker")
    assert dark["accuracy"][0]["baseline"] == plain["accuracy"][0]["baseline"]
    assert dark["sites"][0]["drift"]["mean"] > 10 * plain["sites"][0]["drift"]["mean"]
    ended = cli("recalibrate", BN, "--data", TEST, "-o", "x", "--augment", "mine:lighter")
    assert ended.code == ExitCode.USAGE
    assert "mine has no lighter" in ended.err


# ---- options


@pytest.mark.parametrize(
    ("word", "said"),
    [("--memory=4X", "not a number of bytes"), ("--prior=much", "neither a number"), ("--until=0", "tolerance")],
)
def test_options_that_make_no_sense(cli: Any, word: str, said: str) -> None:
    ended = cli("recalibrate", BN, "--data", UNLABELLED, "-o", "out", word)
    assert ended.code == ExitCode.USAGE
    assert said in ended.err


@pytest.mark.parametrize(("tolerance", "said"), [("0.5", "samples · enough"), ("1e-6", "samples · too few")])
def test_whether_the_data_are_enough_is_said(cli: Any, tolerance: str, said: str) -> None:
    for model in (BN, str(fixture_path("digits_bn.onnx"))):
        out = flat(cli("recalibrate", model, "--data", UNLABELLED, "--dry-run", "--until", tolerance).out)
        assert said in out.replace("method exact · ", "")
    nothing = flat(cli("recalibrate", BN, "--data", UNLABELLED, "--dry-run", "--until", tolerance, "--skip", "*").out)
    assert "enough" not in nothing
    assert "too few" not in nothing


@pytest.mark.parametrize(
    ("word", "number"), [("500M", 500_000_000), ("1.5GiB", 3 << 29), ("4000000", 4_000_000), ("2 k", 2000)]
)
def test_bytes(word: str, number: int) -> None:
    from bnctl.cli.options import parse_bytes

    assert parse_bytes(word) == number


def test_options_of_torch_models_are_refused_for_onnx(cli: Any) -> None:
    model = str(fixture_path("digits_bn.onnx"))
    ended = cli("recalibrate", model, "--data", UNLABELLED, "-o", "out.onnx", "--autocast", "bf16")
    assert ended.code == ExitCode.USAGE
    assert "--autocast" in ended.err


def test_a_run_with_nothing_to_resume_says_so(cli: Any) -> None:
    for model, out in ((BN, "out"), (str(fixture_path("digits_bn.onnx")), "out.onnx")):
        words = ("recalibrate", model, "--data", UNLABELLED, "-o", out)
        assert f"there was no {out}.partial to resume from" in " ".join(cli(*words, "--resume").out.split())
        assert "to resume" not in cli(*words, "--force").out


def test_onnx_models_are_recalibrated_and_judged_too(cli: Any) -> None:
    model = str(fixture_path("digits_bn.onnx"))
    words = ("--data", SHIFTED, "--max-drop", "1", "--json")
    of_onnx = json.loads(cli("recalibrate", model, *words, "-o", "out.onnx").out)
    of_torch = report(cli, *words[:-1], "-o", "out")
    assert of_onnx["verdict"] == "pass"
    assert of_onnx["summary"]["recalibrated"] == of_torch["summary"]["recalibrated"]
    for one, other in zip(of_onnx["sites"], of_torch["sites"], strict=True):
        assert one["drift"]["mean"] == pytest.approx(other["drift"]["mean"], rel=1e-3)
    assert of_onnx["accuracy"][0]["candidate"] == pytest.approx(of_torch["accuracy"][0]["candidate"], abs=0.01)


# ---- interruptions and workers


LOADER = """
import os, time
import numpy as np
from bnctl.fixture import fixture_path

def slow():
    with np.load(fixture_path("shifted_calibration.npz")) as arrays:
        x = arrays["x"]
    for start in range(0, len(x), 10):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        yield x[start:start + 10]
"""


def started(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "recalibrate", BN, "--data", "mine:slow", *words]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(run: subprocess.Popen[str]) -> None:
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, out + err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_a_file_from_which_it_goes_on(how: signal.Signals) -> None:
    Path("mine.py").write_text(LOADER)
    run = started("-o", "out", "--method", "ema", PAUSE="0.2")
    stopped(run, Path("out.partial"), how)
    assert not Path("out").exists()
    ended(started("-o", "out", "--method", "ema", "--resume"))
    ended(started("-o", "whole", "--method", "ema"))
    assert not Path("out.partial").exists()
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def interrupted(cli: Any, *words: str) -> list[str]:
    """The words of a run that failed on its last sample, and left a file from which it could go on."""
    with np.load(fixture_path("shifted_calibration.npz")) as arrays:
        x = arrays["x"].astype(np.float32)
    x[-1] = np.nan
    np.savez("bad.npz", x=x)
    words = ("recalibrate", *words, "--data", "bad.npz", "--batch-size", "4", "--method", "ema", "-o", "out")
    failed = cli(*words)
    assert failed.code == ExitCode.USAGE
    assert "holds NaN" in failed.err
    assert Path("out.partial").exists()
    return [*words, "--resume"]


def test_a_run_does_not_go_on_with_data_that_were_written_anew(cli: Any) -> None:
    words = interrupted(cli, BN)
    os.utime("bad.npz", ns=(1, 1))
    ended = cli(*words)
    assert ended.code == ExitCode.USAGE
    assert "out.partial is of another run: data file was" in ended.err
    assert not Path("out").exists()


def test_a_run_does_not_go_on_with_other_weights(cli: Any) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(fixture_path("digits_bn.safetensors"))
    save_file(weights, "own.safetensors")
    words = interrupted(cli, "bnctl.fixture:with_bn@own.safetensors")
    name = next(name for name in weights if name.endswith("running_mean"))
    save_file(weights | {name: weights[name] + 1}, "own.safetensors")
    ended = cli(*words)
    assert ended.code == ExitCode.USAGE
    assert "is of another run" in ended.err


def test_a_run_does_not_go_on_with_other_arguments_of_the_factory(cli: Any) -> None:
    Path("arguments.py").write_text("from bnctl.fixture import with_bn\ndef build(unused=0):\n    return with_bn()\n")
    words = interrupted(cli, f"arguments:build@{fixture_path('digits_bn.safetensors')}", "--trust")
    ended = cli(*words, "--model-arg", "unused=1")
    assert ended.code == ExitCode.USAGE
    assert "model arguments was" in ended.err


def test_a_folder_where_a_run_would_keep_what_it_knows(cli: Any) -> None:
    Path("out.partial").mkdir()
    ended = cli("recalibrate", BN, "--data", UNLABELLED, "-o", "out")
    assert ended.code == ExitCode.USAGE
    assert "out.partial is a folder" in ended.err
    assert not Path("out").exists()


def test_torchrun_has_one_voice_and_the_same_result(cli: Any) -> None:
    Path("mine.py").write_text(LOADER)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1]), "WORLD_SIZE": "2"}
    runs = [started("-o", "two", "--json", RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in (0, 1)]
    outputs = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert json.loads(outputs[0][0])["output"]["path"] == "two"
    assert outputs[1] == ("", "")
    ended(started("-o", "one"))
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


DYING = """
import os, signal
from mine import slow

def dying():
    for index, x in enumerate(slow()):
        if index == 21 and os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        yield x
"""


def test_torchrun_starts_anew_when_a_worker_dies_and_the_run_goes_on() -> None:
    Path("mine.py").write_text(LOADER)
    Path("worse.py").write_text(DYING)
    words = ("recalibrate", BN, "--method", "ema", "--json")
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "-m", "bnctl")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *torchrun, *words, "--data", "worse:dying", "-o", "two", "--resume"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert "local_rank: 1" in run.stderr  # so torchrun says; the first worker is stopped before it can
    ended(started("-o", "one", "--method", "ema"))
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


# ---- what the data may be


def test_noise_is_refused_where_something_would_be_written(cli: Any) -> None:
    words = ("recalibrate", BN, "--data", "random:16", "--input", "1x1x8x8")
    ended = cli(*words, "-o", "out")
    assert ended.code == ExitCode.USAGE
    assert "random:16 is noise" in ended.err
    assert not Path("out").exists()
    assert cli(*words, "--dry-run").code == ExitCode.OK


def test_a_single_labelled_sample_is_used(cli: Any) -> None:
    with np.load(TEST) as arrays:
        np.savez("one.npz", x=arrays["x"][:1], y=arrays["y"][:1])
    found = report(cli, "--data", "one.npz", "-o", "out")
    assert found["code"] == ExitCode.OK
    assert found["summary"]["samples"] == 1
    ended = cli("recalibrate", BN, "--data", "one.npz", "-o", "again", "--max-drop", "1")
    assert ended.code == ExitCode.USAGE
    assert "the data are too few to hold one sample in 5 out" in ended.err


def test_nan_in_a_sample_that_judges(cli: Any) -> None:
    with np.load(TEST) as arrays:
        x, y = arrays["x"].astype(np.float32), arrays["y"]
    places = located(len(x), len(x), lambda steps: (Batch((np.arange(len(x)),)) for _ in steps))
    judging = np.concatenate([batch.args[0] for batch in hold_out(places, 5)[1]])
    x[judging[3]] = np.nan
    np.savez("bad.npz", x=x, y=y)
    for more in ((), ("--max-drop", "90"), ("--prior", "auto")):
        ended = cli("recalibrate", BN, "--data", "bad.npz", "-o", "out", *more)
        assert ended.code == ExitCode.USAGE
        assert "batch 0 holds NaN or infinity, in a sample that is held out" in ended.err
        assert not Path("out").exists()
    skipped = report(cli, "--data", "bad.npz", "-o", "out", "--on-bad-batch", "skip", "--batch-size", "10")
    assert skipped["code"] == ExitCode.OK
    assert skipped["accuracy"][0]["samples"] == len(judging) - 2  # its batch


def test_held_out_samples_are_named_where_they_may_be_the_cause(cli: Any) -> None:
    ended = cli("recalibrate", BN, "--data", TEST, "-o", "out", "--prior", "-1")
    assert "hold-out" not in ended.err
    np.savez("narrow.npz", x=np.zeros((20, 1, 8, 6), np.float32), y=np.zeros(20, np.int64))
    ended = cli("recalibrate", BN, "--data", "narrow.npz", "-o", "out")
    assert ended.code == ExitCode.USAGE
    assert "--hold-out 0: none" in ended.err


# ---- what an interrupted run leaves


def test_the_same_command_does_not_throw_away_what_it_knew(cli: Any) -> None:
    *words, resume = interrupted(cli, BN)
    assert resume == "--resume"
    kept = Path("out.partial").read_bytes()
    ended = cli(*words)
    assert ended.code == ExitCode.USAGE
    assert "out.partial holds what the same command had found out" in ended.err
    assert "--resume" in ended.err
    assert Path("out.partial").read_bytes() == kept
    anew = cli(*words, "--force", "--on-bad-batch", "skip")
    assert anew.code == 0, anew.err
    assert not Path("out.partial").exists()


def test_what_is_known_of_something_else_gives_way(cli: Any) -> None:
    words = interrupted(cli, BN)[:-1]
    assert cli(*words, "--on-bad-batch", "skip").code == 0


def test_a_file_of_the_users_is_not_taken_for_what_a_run_left(cli: Any) -> None:
    Path("out.partial").write_text("my notes")
    for more in ((), ("--force",)):
        ended = cli("recalibrate", BN, "--data", UNLABELLED, "-o", "out", *more)
        assert ended.code == ExitCode.USAGE
        assert "out.partial exists, and is not what an interrupted run leaves" in ended.err
    assert Path("out.partial").read_text() == "my notes"


def test_data_of_several_files_are_known_by_all_of_them() -> None:
    from bnctl.commands.recalibrate import _stamp

    Path("parts").mkdir()
    for name in "ab":
        Path(f"parts/{name}.npz").write_bytes(b"1")
    stamps = {word: _stamp(word) for word in ("parts", "parts/*.npz", "parts/a.npz")}
    assert None not in stamps.values()
    assert stamps == {word: _stamp(word) for word in stamps}
    os.utime("parts/b.npz", ns=(1, 1))
    changed = {word for word, stamp in stamps.items() if stamp != _stamp(word)}
    assert changed == {"parts", "parts/*.npz"}
    Path("parts/c.npz").write_bytes(b"")
    assert _stamp("parts/*.npz") not in {stamps["parts/*.npz"], None}
    assert [_stamp(word) for word in ("random:8", "module:callable", "hf:name", "nothing/*.npz")] == [None] * 4


def test_a_transform_that_fails_is_not_put_down_to_what_is_held_out(cli: Any) -> None:
    Path("failing.py").write_text("def transform(image):\n    raise ValueError('boom')\n")
    ended = cli("recalibrate", BN, "--data", SHIFTED, "-o", "out", "--augment", "failing:transform")
    assert ended.code == ExitCode.USAGE
    assert "boom" in ended.err
    assert "held out" not in ended.err
