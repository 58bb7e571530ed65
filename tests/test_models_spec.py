from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnctl.errors import ModelError, UsageError
from bnctl.models.spec import BundleWord, FactoryWord, OnnxWord, Pt2Word, parse_model_word, parse_model_words


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.onnx", "B.ONNX", "m.pt2", "w.safetensors", "w.pt", "n.txt"):
        Path(name).write_bytes(b"x")
    Path("bundle").mkdir()
    Path("bundle/bnctl.json").write_text("{}")
    Path("empty").mkdir()


def test_each_kind() -> None:
    assert parse_model_word("a.onnx") == OnnxWord("a.onnx", Path("a.onnx"))
    assert isinstance(parse_model_word("B.ONNX"), OnnxWord)
    assert parse_model_word("m.pt2") == Pt2Word("m.pt2", Path("m.pt2"))
    assert parse_model_word("bundle/") == BundleWord("bundle/", Path("bundle"))
    plain = parse_model_word("my_code.nets:build")
    assert plain == FactoryWord("my_code.nets:build", "my_code.nets", "build", None)
    assert plain.factory == "my_code.nets:build"
    one = parse_model_word("torchvision.models:resnet18@w.safetensors")
    assert one == FactoryWord(
        "torchvision.models:resnet18@w.safetensors", "torchvision.models", "resnet18", Path("w.safetensors")
    )


def test_weights_go_to_every_factory_that_has_none() -> None:
    words = ["m:a", "m:b@w.safetensors", "a.onnx"]
    a, b, onnx = parse_model_words(words, weights="w.pt")
    assert isinstance(a, FactoryWord) and a.weights == Path("w.pt")
    assert isinstance(b, FactoryWord) and b.weights == Path("w.safetensors")
    assert isinstance(onnx, OnnxWord)
    with pytest.raises(UsageError, match="no model here takes weights"):
        parse_model_words(words[1:], weights="w.pt")


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("w.pt", "pickled model is code", "--weights w.pt"),
        ("gone.ckpt", "pickled model is code", "factory"),
        ("w.safetensors", "weights without a model", "callable@w.safetensors"),
        ("n.txt", "not a kind of model", "bundle"),
        ("a.onx", "no such file", "a.onnx"),
        ("b.onnx", "no such file", "a.onnx"),
        ("nowhere/a.onnx", "no such file", "nowhere"),
        ("empty", "holds no bnctl.json", "bnctl wrote"),
        ("torchvision.models.resnet18", "no such file", "torchvision.models:resnet18"),
        ("m:a@gone.safetensors", "no such file", None),
        ("m:a@n.txt", "not a weight file", ".safetensors"),
        ("m:a-b", "no such file", None),
    ],
)
def test_errors_say_the_way_out(word: str, message: str, hint: str | None) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse_model_word(word)
    if hint is not None:
        assert hint in (caught.value.hint or "")


@given(st.text(min_size=1, max_size=30))
def test_any_word_parses_or_is_refused(word: str) -> None:
    try:
        parse_model_word(word)
    except (ModelError, UsageError) as error:
        assert error.message
