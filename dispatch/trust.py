"""Who else could change what lies at a path. What is loaded is code, or decides which code runs.

One rule for generated packages and for the cache of compiled kernels. Trusted are root, the user of this process
and the owner of this very file: who can change the code that checks needs no other way in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from importlib.machinery import all_suffixes
from pathlib import Path

HERE = Path(__file__).resolve()
MAX_LINKS = 40  # as many as Linux follows

BYTECODE = "__pycache__"


def distrust(path: Path) -> str:
    """Why somebody else may change or replace what lies at ``path``, or an empty text.

    Every folder and every symbolic link on the way counts, since it can be exchanged for another. A folder with
    the sticky bit, as ``/tmp``, is no danger to what a trusted user has in it. Write permission of a group that has
    no other member is none of others. Folders that hold DKS itself are not asked.
    """
    try:
        steps = list(_steps(path.absolute()))
        for step in steps:
            if step in HERE.parents:
                continue
            status = step.lstat()
            if status.st_uid not in trusted():
                return f"{step}: owned by user {status.st_uid}, expected root or user {os.geteuid()}: chown it"
            passed = step != steps[-1] and bool(status.st_mode & stat.S_ISVTX)
            if not stat.S_ISLNK(status.st_mode) and not passed and _others_write(status):
                return f"{step}: others may write there, expected a path of your own: chmod go-w"
    except OSError as error:
        return f"{path}: can't be examined ({error.strerror})"
    return ""


def strangers(folder: Path) -> list[str]:
    """One line for each thing in a package's folder, and for the folder, that others may write or that leads
    elsewhere; ``distrust`` looks at the way to it.

    Stricter: no group may write, whoever is in it. ``__pycache__`` alone is as its makers' umask left it.
    """
    if folder.is_symlink():
        return [f"{folder}: found a link, expected the package's own folder: name {folder.resolve()} instead"]
    lines = []
    for path in (folder, *sorted(folder.iterdir())):
        status = path.lstat()
        name = f"{path}" if path == folder else path.name
        if stat.S_ISLNK(status.st_mode):
            lines.append(f"{name}: found a link, expected a plain file")
        elif status.st_uid not in trusted():
            lines.append(f"{name}: owned by user {status.st_uid}, expected root or user {os.geteuid()}: chown it")
        elif _others_write(status) or (path.name != BYTECODE and status.st_mode & stat.S_IWGRP):
            lines.append(f"{name}: others may write it, expected that only you may: chmod go-w")
    return lines


def importable(path: Path) -> bool:
    """Whether Python would take it for a module of the folder that it is in."""
    return path.is_dir() or path.name.endswith(tuple(all_suffixes()))


def tighten(path: Path) -> None:
    """Take from others the permission to write, whatever the umask gave them."""
    path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, none of which others may write, whatever the umask.

    Raises:
        OSError: one can't be made.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o755, exist_ok=True)


def trusted() -> set[int]:
    """User ids that may change what is loaded here."""
    return {0, os.geteuid(), HERE.stat().st_uid}


def _steps(path: Path) -> Iterator[Path]:
    """Every folder and link from the root to what ``path`` means, that last one included."""
    at, todo, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield at
    while todo:
        part = todo.pop()
        at = at.parent if part == ".." else at / part
        yield at
        if at.is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise OSError(40, "too many levels of symbolic links")
            target = at.readlink()
            at = Path(target.anchor) if target.is_absolute() else at.parent
            todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _private(status.st_gid)


def _private(gid: int) -> bool:
    """Whether a group is this user's own: of the same name and with no other member, as most Linux systems make
    one for each user, with a umask that lets it write."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}
