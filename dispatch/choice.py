"""What a lookup answers, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves a call, how well the table knew the call, and why.

    Attributes:
        op: the operator.
        candidate: id of what runs, e.g. ``mkl.linear_packed/rows512``.
        match: ``exact``, ``bin``, ``nearest`` or ``default``.
        reason: one sentence.
        rule: the rule's evidence from the table, None where the default serves for want of a rule.
    """

    op: str
    candidate: str
    match: str
    reason: str
    rule: Mapping[str, object] | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} -> {self.candidate}  ({self.match} match)", f"  {self.reason}"]
        lines += [f"  {name}: {value}" for name, value in (self.rule or {}).items()]
        return "\n".join(lines)
