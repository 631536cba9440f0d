"""Who else could change what lies at a path. What is loaded is code, or decides which code runs.

One rule for generated packages and for the cache of compiled kernels. Trusted are root, the user of this process
and the owner of this very file: who can change the code that checks needs no other way in.
"""

from __future__ import annotations

import os
import secrets
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
                return f"{step}: {_foreign(status)}"
            passed = step != steps[-1] and bool(status.st_mode & stat.S_ISVTX)
            if not stat.S_ISLNK(status.st_mode) and not passed and _others_write(status):
                return f"{step}: others may write there, expected a path of your own: {_closing(status)}"
    except OSError as error:
        return f"{path}: can't be examined ({error.strerror})"
    return ""


def strangers(folder: Path) -> list[str]:
    """One line for each thing in a package's folder, and for the folder, that others may write or exchange;
    ``distrust`` looks at the way to it.

    Stricter: no group may write, whoever is in it. ``__pycache__`` alone is as its makers' umask left it. A link is
    as good as all that it leads through: volumes of Kubernetes are made of them.
    """
    lines = []
    for path in (folder, *sorted(folder.iterdir())):
        name = f"{path}" if path == folder else path.name
        if path.is_symlink() and (why := distrust(path)):
            lines.append(f"{name}: found a link that others could redirect: {why}")
            continue
        status = path.stat()
        if status.st_uid not in trusted():
            lines.append(f"{name}: {_foreign(status)}")
        elif _others_write(status) or (path.name != BYTECODE and status.st_mode & stat.S_IWGRP):
            lines.append(f"{name}: others may write it, expected that only you may: {_closing(status)}")
    return lines


def importable(path: Path) -> bool:
    """Whether Python would take it for a module of the folder that it is in."""
    return ("." not in path.name and path.is_dir()) or path.name.endswith(tuple(all_suffixes()))


def tighten(path: Path) -> None:
    """Take from others the permission to write, whatever the umask gave them."""
    path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def put(path: Path, data: bytes) -> None:
    """Write a file in one step: it is there whole, or what was there before. Others may read it if the umask lets
    them, and never write it.

    Raises:
        OSError: it can't be written.
    """
    partial = path.with_name(f".partial-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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


def _foreign(status: os.stat_result) -> str:
    mend = "chown it" if os.geteuid() == 0 else "ask root to chown it, or copy it to a folder of your own"
    return f"owned by user {status.st_uid}, expected root or user {os.geteuid()}: {mend}"


def _closing(status: os.stat_result) -> str:
    if os.geteuid() in (0, status.st_uid):
        return "chmod go-w"
    return f"ask user {status.st_uid} for chmod go-w, or copy it to a folder of your own"


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _private(status.st_gid)


def _private(gid: int) -> bool:
    """Whether a group is this user's own: of the same name and with no other member, as most Linux systems make
    one for each user, with a umask that lets it write. Where neither has a name, of the same number."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = ""
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return not user and gid == os.geteuid()
    return group.gr_name == user and set(group.gr_mem) <= {user}
