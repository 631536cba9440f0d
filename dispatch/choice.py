"""What a lookup answers, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from dks.dispatch.problem import short

WIDTH = 110
"""Letters of a line at most, where words allow."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves a call, how well the table knew the call, and why.

    Attributes:
        op: the operator.
        candidate: id of what runs, e.g. ``mkl.linear_packed/rows512``.
        match: ``exact``, ``bin``, ``nearest`` or ``default``.
        reason: one sentence.
        rule: the rule's evidence from the table, None where the default serves for want of a rule.
        story: (label, text) of all else that is known, in order; an empty label goes on with the one above.
    """

    op: str
    candidate: str
    match: str
    reason: str
    rule: Mapping[str, object] | None = None
    story: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op} -> {short(self.candidate)}  ({self.match} match)"]
        told = (("why", self.reason), *self.story)
        indent = 4 + max(len(label) for label, _ in told)
        for label, text in told:
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent=f"  {label}".ljust(indent),
                subsequent_indent=" " * (indent + 2),
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines)
