"""``make bench-gpu-heldout``: on sizes that no choice was made from, the tables' choices against the best measured.

It measures nothing: the sweeps measured every candidate on a ragged size inside each bin, and the tables'
certificates compare it with what they choose there.
"""

from __future__ import annotations

import json
import sys

from bench.gpu import HOME, NotHere
from bench.gpu_run import report
from bench.heldout import certified
from bench.report import Row
from dks.dispatch.environment import Environment

PACKAGES = ("h200_llama3_8b", "h200_llama3_70b")
TARGET = 0.98


def rows() -> tuple[list[Row], Environment]:
    """A row an operator and one for all, of each table; where they were measured. Raises NotHere without any."""
    found: list[Row] = []
    environment = None
    for name in PACKAGES:
        path = HOME / "out" / name / "lut.json"
        if not path.is_file():
            continue
        lut = json.loads(path.read_text(encoding="utf-8"))
        if lut["certificate"] is None:
            continue
        environment = Environment.from_dict(lut["environment"])
        for each in certified(name, lut["certificate"]):
            found.append(Row(each.id, each.workload, each.peer, each.ratio, TARGET, {**each.extra, "note": ""}))
    if environment is None:
        raise NotHere(f"needs one of the packages {', '.join(PACKAGES)} in {HOME / 'out'}, with sizes held out")
    return found, environment


def main() -> int:
    try:
        found, environment = rows()
    except NotHere as error:
        print(f"bench gpu-heldout: {error}", file=sys.stderr)
        return 2
    report("heldout", found, [], environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
