"""Files that appear whole or not at all: written beside their target, flushed to disk, then moved over it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gpd_fx.errors import ArgumentError


def output_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a file that can be written.

    Raises:
        ArgumentError: it is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise ArgumentError(f"path={str(path)!r} is a folder; give a file name in it, such as {str(target / 'file')!r}")
    if not target.parent.is_dir():
        raise ArgumentError(f"path={str(path)!r}: the folder {str(target.parent)!r} does not exist; create it first")
    return target


@contextmanager
def staging(target: Path) -> Generator[Path]:
    """A temporary folder beside `target`, so that moving a file out of it is atomic; it is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder)


def publish(source: Path, target: Path) -> None:
    """Flush `source` to disk and move it over `target` in one step, with the permissions that any new file gets."""
    usual = source.with_name(f"{source.name}.new")  # some writers make files that only their owner can read
    usual.touch()
    source.chmod(usual.stat().st_mode)
    usual.unlink()
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def write_text(target: Path, text: str) -> None:
    """Write a whole text file in one step, as UTF-8."""
    with staging(target) as folder:
        draft = folder / target.name
        draft.write_text(text, encoding="utf-8")
        publish(draft, target)
