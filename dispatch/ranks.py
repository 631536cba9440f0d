"""Do all processes of a server hold the same table? Ranks that choose differently wait for each other forever."""

from __future__ import annotations

import torch.distributed as dist


def check_ranks(table_hash: str) -> None:
    """Compare ``manifest.table_hash`` over all ranks of the default process group; nothing where there is none.

    A collective call: every rank makes it, after loading and after each ``reload``, and every rank gets the same
    answer. It goes by ``all_gather_object``, which needs any backend (gloo, NCCL with a device set)::

        check_ranks(tables.table_hash())

    Raises:
        RuntimeError: the hashes differ; it names the ranks that differ from rank 0.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, table_hash)
    odd = [str(rank) for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise RuntimeError(
            f"table: found another one on rank(s) {', '.join(odd)} ({found[int(odd[0])][:12]}) than on rank 0 "
            f"({found[0][:12]}), expected the same on all: give every rank the same package and machine, and look "
            "at stats() for entries that are switched off"
        )
