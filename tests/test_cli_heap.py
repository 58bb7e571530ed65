"""Memory that is freed is taken again, and not asked from the system anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import sys
import threading

if sys.argv[1] == "kept":
    from bnctl.cli.heap import keep_freed_memory

    keep_freed_memory()


def blocks():
    return sum(len(b"x" * (40_000_000 + n)) for n in range(4))


def in_a_thread():
    thread = threading.Thread(target=blocks)
    thread.start()
    thread.join()


in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    in_a_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_large_blocks_are_cleared_once() -> None:
    pages = 12 * 40_000_000 // 4096
    assert faults("as it is") > pages / 2
    assert faults("kept") < pages / 100
