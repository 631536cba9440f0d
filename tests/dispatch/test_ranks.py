"""Do the ranks of a server hold the same table? Two real processes, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dks.dispatch.ranks import check_ranks

ROOT = Path(__file__).parent.parent.parent

RANK = """
import sys
import torch.distributed as dist
from dks.dispatch.ranks import check_ranks

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
check_ranks("a" * 64)
try:
    check_ranks("ab"[rank] * 64)
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""


def test_without_a_process_group_there_is_nothing_to_compare() -> None:
    check_ranks("a")


def test_ranks_that_differ_are_named_on_every_rank(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert said.startswith("table: found another one on rank(s) 1 (bbbbbbbbbbbb) than on rank 0 (aaaaaaaaaaaa)")
