"""Writing without half-written results.

What is written first lives in a hidden folder beside its destination (the same file system), is flushed to the disk, and is moved
into place in one step. An exception on the way leaves the destination as it was and removes the hidden folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnctl.errors import ModelError, UsageError


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse an output that is there already.

    Raises:
        UsageError: `path` exists (a dangling link counts) and `force` is not set.
    """
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists already", hint="give another output, or --force to replace it")


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`; it is removed with all that is left in it.

    Raises:
        ModelError: the folder of `path` does not exist or cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".bnctl-", dir=path.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write to {path.parent}: {error.strerror}", hint="create the folder, or choose another output"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(new: Path, path: Path, *, force: bool) -> None:
    """Move the finished file or folder `new` to `path`, in one step and on the disk.

    A folder cannot replace a folder in one step on Linux, so an old one is first moved into the staging folder that holds `new`, and
    comes back if the second step fails.

    Raises:
        UsageError: `path` exists and `force` is not set, or one of the two is a folder and the other is not.
    """
    refuse_existing(path, force=force)
    if os.path.lexists(path) and (path.is_dir() and not path.is_symlink()) != new.is_dir():
        kind = "a folder" if path.is_dir() else "a file"
        raise UsageError(f"{path} is {kind} and the new output is not", hint="give another output")
    flush(new)
    if new.is_dir() and path.exists():
        old = new.with_name(f"{new.name}.old")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    else:
        new.replace(path)
    _flush_entry(path.parent)


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield where to write a file or folder; when the block ends well, it becomes `path`.

    The yielded path has the name of `path`, suffix included, and does not exist yet. If the block raises, or writes nothing, `path`
    stays as it was.

    Raises:
        UsageError: `path` exists and `force` is not set (checked before and after the block).
        ModelError: the folder cannot be written to, or the block wrote nothing.
    """
    target = Path(path)
    refuse_existing(target, force=force)
    with staging(target) as folder:
        new = folder / target.name
        yield new
        if not new.exists():
            raise ModelError(f"nothing was written for {target}", hint="please report this")
        publish(new, target, force=force)


def flush(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    for child in sorted(path.iterdir()) if path.is_dir() else ():
        flush(child)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
