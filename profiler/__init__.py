"""Offline measurement: sweep configs, benchmarking, the Parquet store, dks-profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


def read(run_dir: str | Path) -> pandas.DataFrame:
    """All that sweeps have acknowledged in a run directory: while one is at work, or after it was killed.

    Returns:
        One row a candidate on a problem: the fields of ``dks.dispatch.evidence.Measurement``, and ``unfinished``,
        true if the row may still change. ``attrs["state"]`` says why the run is not finished, and is empty if it
        is; ``attrs["notes"]`` what else there is to know.

    Raises:
        BadInput: there is no such directory, it may not be read, or nothing is in it.

    Warns:
        RuntimeWarning: of each file or record that is damaged. All others are read.
    """
    import warnings
    from dataclasses import asdict

    import pandas

    from dks.profiler.look import look

    found = look(Path(run_dir))
    for line in found.damaged:
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    unfinished = {(contest.problem.id, contest.mode) for contest in found.unfinished}
    frame = pandas.DataFrame([asdict(row) for row in found.rows])
    frame["unfinished"] = [(row.problem, row.mode) in unfinished for row in found.rows]
    frame.attrs |= {"state": found.state, "notes": found.notes}
    return frame
