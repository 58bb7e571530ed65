from __future__ import annotations

from pathlib import Path

import pytest

from bnctl.errors import ModelError, UsageError
from bnctl.models.write import atomic_path


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_file_appears_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.onnx") as new:
        new.write_text("one")
        assert new.name == "a.onnx"
        assert not (tmp_path / "a.onnx").exists()
    assert (tmp_path / "a.onnx").read_text() == "one"
    assert names(tmp_path) == {"a.onnx"}


def test_an_exception_inside_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a", force=True) as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_an_existing_output_is_refused_without_force(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(UsageError, match="exists already") as caught, atomic_path(tmp_path / "a"):
        pytest.fail("the block must not run")
    assert "--force" in (caught.value.hint or "")


def test_an_output_that_appears_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError), atomic_path(tmp_path / "a") as new:
        new.write_text("mine")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs"


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError), atomic_path(tmp_path / "a"):
        pass


def test_a_folder_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("")
    with atomic_path(tmp_path / "d", force=True) as new:
        new.mkdir()
        (new / "new").write_text("")
        assert (tmp_path / "d" / "old").exists()
    assert names(tmp_path / "d") == {"new"}
    assert names(tmp_path) == {"d"}


def test_the_old_folder_comes_back_if_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("")
    rename = Path.rename

    def fail_on_new(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="disk full"), atomic_path(tmp_path / "d", force=True) as new:
        new.mkdir()
        (new / "new").write_text("")
    assert names(tmp_path / "d") == {"old"}
    assert names(tmp_path) == {"d"}


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UsageError, match="is a folder"), atomic_path(tmp_path / "d", force=True) as new:
        new.write_text("")
    assert (tmp_path / "d").is_dir()


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"), atomic_path(tmp_path / "nowhere" / "a"):
        pass
