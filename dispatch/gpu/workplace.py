"""A folder for one build, which is gone after it: at once, or where the build was killed, with the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".triton-"


@contextmanager
def work_folder(parent: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder in ``parent``, and a descriptor of it that says that somebody works there.

    What holds the descriptor or has inherited it, a process that compiles as well, keeps the folder from being
    cleared away as a leftover. Folders that nobody holds are: the system lets go for a process however it ends.
    """
    clear(parent)
    folder, held = _claimed(parent)
    try:
        yield folder, held
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def clear(parent: Path) -> None:
    """Remove what builds that were killed have left in ``parent``."""
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone already, no folder, or somebody works there
            held = _opened(left)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


def _claimed(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):  # taken for a leftover before it was held: another one, then
            held = _opened(folder)
            with suppress(OSError):  # a file system without locks: nothing is cleared away there either
                fcntl.flock(held, fcntl.LOCK_SH)
            if folder.exists():
                return folder, held
            os.close(held)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
