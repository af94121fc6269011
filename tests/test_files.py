"""Files appear whole, with ordinary permissions, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpd_fx.errors import ArgumentError
from gpd_fx.io.files import output_path, publish, staging


def test_a_published_file_replaces_the_old_one_and_the_staging_folder_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_text("old")
    with staging(target) as folder:
        assert folder.parent == tmp_path  # on the same file system, so that the move is atomic
        (folder / "new").write_text("new")
        assert target.read_text() == "old"
        publish(folder / "new", target)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def interrupted(target: Path) -> None:
    with staging(target) as folder:
        (folder / "new").write_text("half")
        raise KeyboardInterrupt


def test_an_error_before_publishing_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    target, other = tmp_path / "result", tmp_path / "other"
    other.touch()
    with staging(target) as folder:
        (folder / "new").touch(mode=0o600)
        publish(folder / "new", target)
    assert target.stat().st_mode == other.stat().st_mode


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    assert output_path(str(tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(ArgumentError, match="is a folder; give a file name"):
        output_path(tmp_path)
    with pytest.raises(ArgumentError, match="does not exist; create it first"):
        output_path(tmp_path / "no" / "a")
