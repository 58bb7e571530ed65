"""What a `--data` word means."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bnctl.data.open import open_data
from bnctl.data.preprocess import Preprocess
from bnctl.data.synthetic import InputSpec
from bnctl.errors import DataError, UsageError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a" / f"{i}.png")
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2), np.float32), y=np.arange(3))
    (tmp_path / "loader_word.py").write_text("import numpy as np\ndef make():\n    return [np.zeros((3, 2))]\n")
    yield tmp_path
    sys.modules.pop("loader_word", None)


@pytest.mark.parametrize("word", ["images", "images/", "data.npz", "loader_word:make", "random:3"])
def test_every_kind_can_be_read_twice_and_limited(place, word):
    batches = open_data(word, inputs=(InputSpec((1, 2)),))
    for _ in range(2):
        assert [b.size for b in batches] == [3]
    limited = open_data(word, inputs=(InputSpec((1, 2)),), limit=2)
    assert sum(b.size for b in limited) == 2


def test_paths_and_batch_sizes(place):
    assert [b.size for b in open_data(place / "data.npz", batch_size=2)] == [2, 1]
    assert len(open_data(str(place / "images"), batch_size=2)) == 2


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("date.npz", "data.npz"),
        ("image", "images"),
        ("nowhere/data.npz", "random:N"),
        ("dat.parquet", "random:N"),
        ("shards/*.tar", "random:N"),
        ("nothing_like_it", "random:N"),
        ("array.npy", "np.savez"),
        ("notes.txt", "random:N"),
        ("random", "random:N"),
    ],
)
def test_what_is_not_there_or_not_known(place, word, hint):
    for name in ("array.npy", "notes.txt"):
        (place / name).write_text("")
    with pytest.raises(DataError) as caught:
        open_data(word)
    assert word in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("word", ["random:", "random:x", "random:-1", "random:0"])
def test_random_needs_a_number(place, word):
    with pytest.raises(UsageError) as caught:
        open_data(word, inputs=(InputSpec((1, 2)),))
    assert "random:256" in caught.value.hint


def test_options_that_are_off_or_do_not_fit(place):
    for options in ({"batch_size": 0}, {"limit": 0}, {"limit": -2}, {"workers": -1}):
        with pytest.raises(UsageError, match=r"the (batch size|limit|number of workers) is"):
            open_data("data.npz", **options)
    for word in ("random:4", "loader_word:make"):
        with pytest.raises(UsageError, match="--preprocess is for images"):
            open_data(word, preprocess=Preprocess(), inputs=(InputSpec((1, 2)),))
    with pytest.raises(UsageError, match="need the shapes"):
        open_data("random:4")
    for word in ("hf:", "hf::test"):
        with pytest.raises(UsageError, match="names no dataset") as caught:
            open_data(word)
        assert "hf:" in caught.value.hint


def test_reading_data_needs_neither_torch_nor_onnxruntime(place):
    code = (
        "import sys\nfrom bnctl.data.open import open_data\nfrom bnctl.data.synthetic import parse_input\n"
        "for word in ('images', 'data.npz', 'loader_word:make', 'random:3'):\n"
        "    assert sum(b.size for b in open_data(word, inputs=(parse_input('1x2'),))) == 3\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place)
    assert done.stdout.strip() == "[]", done.stdout
