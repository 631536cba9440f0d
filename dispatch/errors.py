"""The one error that a user's input can cause."""

from __future__ import annotations

import os
from pathlib import Path


class BadInput(Exception):
    """Input that can't be used. Its text names the subject, what was found, what was expected, what to do.

    The commands print it without a traceback and exit with 2.
    """


def unreadable(path: Path | str, error: OSError) -> str:
    """Why something can't be read, and what the user who asked for it can do."""
    text = f"{path}: can't be read ({error.strerror or error})"
    if not isinstance(error, PermissionError):
        return text
    try:
        owner = f"its owner, user {Path(path).stat().st_uid},"
    except OSError:  # a folder on the way is closed
        owner = "its owner"
    return f"{text} by user {os.geteuid()}; ask {owner} for chmod -R go+rX, or run as the owner"
