"""The one error that a user's input can cause."""

from __future__ import annotations


class BadInput(Exception):
    """Input that can't be used. Its text names the subject, what was found, what was expected, what to do.

    The commands print it without a traceback and exit with 2.
    """
