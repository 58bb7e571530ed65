"""The user's own loaders."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from bnctl.data.loader import is_loader_word, read_loader
from bnctl.errors import DataError

CODE = """
import sys
import numpy as np

X = np.arange(20, dtype=np.float32).reshape(10, 2)
calls = []

def generator():
    calls.append(1)
    from {late} import SIZE          # found only in the current folder, and only now
    for i in range(0, 10, SIZE):
        yield X[i:i + SIZE], np.arange(i, min(i + SIZE, 10))

def listed():
    return [{{"x": X}}]

class Space:
    @staticmethod
    def inside():
        return iter([X])

def broken():
    yield X
    raise RuntimeError("disk gone")

def needs(argument):
    return []

def leaves():
    sys.exit(0)

def nothing():
    return None

def tensor():
    return X

def empty():
    return []

value = [X]
"""
numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, under a name that no other test has imported."""
    name = f"loaders_for_tests_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(CODE.format(late=f"{name}_late"))
    (tmp_path / f"{name}_late.py").write_text("SIZE = 4")
    monkeypatch.chdir(tmp_path)
    yield name
    for imported in (name, f"{name}_late"):
        sys.modules.pop(imported, None)


def test_called_anew_for_each_pass(module):
    before = list(sys.path)
    batches = read_loader(f"{module}:generator")
    for number in (1, 2):
        read = []
        for batch in batches:
            assert sys.path == before  # the current folder is importable only while the loader runs
            read.append(batch)
        np.testing.assert_array_equal(np.concatenate([b.args[0] for b in read]), sys.modules[module].X)
        np.testing.assert_array_equal(np.concatenate([b.labels for b in read]), np.arange(10))
        assert len(sys.modules[module].calls) == number
    assert sys.path == before


@pytest.mark.parametrize("function", ["listed", "Space.inside"])
def test_other_callables(module, function):
    for _ in range(2):
        (batch,) = read_loader(f"{module}:{function}")
        assert batch.size == 10


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, [1]), (3, [3]), (4, [4]), (6, [4, 2]), (10, [4, 4, 2]), (99, [4, 4, 2])]
)
def test_a_limit_is_kept_to_the_sample(module, limit, sizes):
    read = list(read_loader(f"{module}:generator", limit=limit))
    assert [b.size for b in read] == [len(b.labels) for b in read] == sizes
    np.testing.assert_array_equal(np.concatenate([b.args[0] for b in read]), sys.modules[module].X[: sum(sizes)])
    np.testing.assert_array_equal(np.concatenate([b.labels for b in read]), np.arange(sum(sizes)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "fails at batch 1: RuntimeError: disk gone"),
        ("needs", r"needs\(\) fails: TypeError"),
        ("leaves", r"leaves\(\) fails: SystemExit"),
        ("nothing", "returns is None, not an iterable"),
        ("tensor", "returns is a ndarray, not an iterable"),
        ("empty", "holds no samples"),
    ],
)
def test_failures_in_a_pass(module, function, message):
    before = list(sys.path)
    batches = read_loader(f"{module}:{function}")
    with pytest.raises(DataError, match=message) as caught:
        list(batches)
    assert f"{module}:{function}" in caught.value.message
    assert caught.value.hint
    assert sys.path == before


def test_failures_at_once(module, tmp_path):
    (tmp_path / f"{module}_bad.py").write_text("import sys; sys.exit(3)")
    for word, message, hint in [
        (f"{module}:generater", "has no generater", "generator"),
        (f"{module}:value", "is a list, not callable", "function"),
        (f"{module}_none:f", f"no module named {module}_none", "install"),
        (f"{module}_bad:f", "importing .* fails: SystemExit", "cause"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            read_loader(word)
        assert hint in caught.value.hint


def test_words():
    assert is_loader_word("a.b:c.d")
    for word in ("a.b", "a:b:c", "a/b:c", "1a:b", "a:", "C:\\data", "a:1"):
        assert not is_loader_word(word)


def test_the_same_iterator_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once_only.py").write_text(
        "import numpy as np\nkept = iter([np.zeros((4, 2))] * 3)\ndef same():\n    return kept\n"
    )
    data = read_loader("once_only:same")
    next(iter(data))
    with pytest.raises(DataError, match="returned the same iterator again") as caught:
        list(data)
    assert "a new one in each call" in caught.value.hint
