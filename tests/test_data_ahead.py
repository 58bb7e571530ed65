"""Threads that work ahead."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bnctl.data.ahead import THREAD_NAME, map_groups
from bnctl.data.folder import read_folder
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError
from conftest import HEARING


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=6), st.integers(0, 4))
def test_results_come_in_order_whatever_takes_longer(groups, workers):
    def slow_where_even(number):
        if workers and number % 2 == 0:
            time.sleep(0.0005)
        return number * 2

    tagged = list(enumerate(groups))
    got = list(map_groups(slow_where_even, tagged, workers=workers))
    assert got == [(tag, [2 * number for number in group]) for tag, group in tagged]
    assert not threads()


def test_two_items_per_thread_are_done_ahead_and_no_more():
    """The groups that were asked for, when the first is returned: with threads some, but not all."""
    for workers, size, most in ((0, 1, 1), (2, 1, 5), (2, 3, 3), (2, 50, 2), (1, 2, 2), (2, 0, 5)):
        asked = []

        def groups(size=size, asked=asked):
            for number in range(100):
                asked.append(number)
                yield number, [number] * size

        results = map_groups(lambda item: item, groups(), workers=workers)
        next(results)
        assert len(asked) == most
        results.close()


def test_the_threads_work_at_the_same_time():
    """Each item waits until another one has begun: with one thread that never comes."""
    together = threading.Barrier(2)
    assert len(list(map_groups(lambda _: together.wait(30), [(0, [1, 2]), (1, [3, 4])], workers=2))) == 2
    alone = threading.Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        list(map_groups(lambda _: alone.wait(0.05), [(0, [1, 2])], workers=1))


def test_an_error_comes_when_its_result_is_due():
    def call(item):
        if item == 5:
            raise ValueError("five")
        return item

    for workers in (0, 3):
        results = map_groups(call, [(0, [1, 2]), (1, [3, 4]), (2, [5, 6]), (3, [7])], workers=workers)
        assert [next(results)[1], next(results)[1]] == [[1, 2], [3, 4]]
        with pytest.raises(ValueError, match="five"):
            next(results)
        assert not threads()


class Stopped(Exception):
    pass


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_a_folder_read_by_threads_is_the_same_to_the_bit(folder, workers, batch_size):
    steps = Preprocess(resize=12, crop=8, mean=(0.4, 0.5, 0.6), std=0.2)
    options = {"batch_size": batch_size, "preprocess": steps, "seed": 3}
    alone, ahead = (list(read_folder(folder, **options, workers=n).every(1, 2)) for n in (0, workers))
    for (i, one), (j, two) in zip(alone, ahead, strict=True):
        assert (i, one.start) == (j, two.start)
        assert one.args[0].tobytes() == two.args[0].tobytes()
        np.testing.assert_array_equal(one.labels, two.labels)
    assert not threads()


def test_a_broken_image_is_named_by_threads_too(folder):
    (folder / "b" / "7.png").write_bytes(b"text")
    messages = set()
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"b/7\.png is not an image") as caught:
            list(read_folder(folder, batch_size=4, workers=workers))
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert not threads()


def test_the_threads_end_with_the_one_who_reads(folder):
    batches = read_folder(folder, batch_size=2, workers=2)
    passing = batches.every()
    next(passing)
    assert threads()
    passing.close()
    assert not threads()
    for _ in batches:
        break
    assert not threads()
    with pytest.raises(Stopped):
        for _ in batches:
            assert threads()
            raise Stopped
    del _
    assert not threads()


def test_ctrl_c_ends_the_process(folder):
    code = (
        HEARING + "import sys, time\nfrom pathlib import Path\nfrom bnctl.data.folder import read_folder\n"
        "for batch in read_folder(Path(sys.argv[1]), batch_size=1, workers=2):\n"
        "    print('reading', flush=True)\n"
        "    for _ in range(6000):  # a signal that comes just before a sleep does not shorten it\n"
        "        time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert error.strip().endswith("KeyboardInterrupt")
