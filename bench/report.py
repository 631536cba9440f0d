"""The form of every benchmark's result: what ran, where, at which commit, and rows of ratios."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dks.dispatch.environment import Environment
from dks.dispatch.intervals import Interval

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One comparison: ratio = peer's time / ours over interleaved pairs, above 1 is faster.

    Attributes:
        id: unique in the result.
        workload: what was run, in words.
        peer: what it is compared with, in words.
        ratio: with its 95 % interval; None where the peer was not measured.
        target: what the ratio should reach, None where nothing is set.
        extra: further figures of the row, written beside the others.
    """

    id: str
    workload: str
    peer: str
    ratio: Interval | None
    target: float | None = None
    extra: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The row as the result file holds it."""
        ratio = self.ratio
        return {
            "id": self.id,
            "workload": self.workload,
            "peer": self.peer,
            "ratio": ratio and finite(ratio.value),
            "ci_low": ratio and finite(ratio.low),
            "ci_high": ratio and finite(ratio.high),
            "pairs": ratio and ratio.n,
            "target": self.target,
            **self.extra,
        }


def finite(value: float) -> float | None:
    """Four decimals; None for an end that too few pairs leave open."""
    return round(value, 4) if math.isfinite(value) else None


def write_result(
    name: str, rows: Sequence[Row], notes: Sequence[str] = (), environment: Environment | None = None
) -> Path:
    """Write runs/<name>/result.json and return its path; the environment is the CPU's where none is given."""
    path = ROOT / "runs" / name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "environment": (environment or Environment.current()).to_dict(),
        "commit": commit(),
        "notes": list(notes),
        "rows": [row.to_json() for row in rows],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def commit() -> str:
    """The commit of this checkout, ``+changes`` behind it where files differ; ``unknown`` outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment_lines() -> list[str]:
    """The environment, one field a line, for the head of a printed report."""
    return [f"{name}: {value}" for name, value in dataclasses.asdict(Environment.current()).items()]
