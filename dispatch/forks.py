"""What the child of a fork makes anew.

A lock that another thread of the parent held is never given back there, and what that thread was at is never ended.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Renewed(Protocol):
    """Whatever holds a lock, or changes something in more than one step."""

    def after_fork(self) -> None:
        """Make the locks anew, without taking one, and bring in order what a lost thread may have left half done.
        Called in the child, before anything else runs there."""


_alive: WeakSet[Renewed] = WeakSet()


def enroll(owner: Renewed) -> None:
    """Let ``owner`` be made anew in every child, as long as it lives."""
    _alive.add(owner)


def _after_fork() -> None:
    for owner in list(_alive):
        owner.after_fork()


os.register_at_fork(after_in_child=_after_fork)
