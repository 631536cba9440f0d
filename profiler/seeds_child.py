"""The process that asks NVIDIA's matmul heuristics: one request on its input, one answer on its output, both JSON.

Run as a file, not as a module of DKS. On its own, because the library (nvidia-matmul-heuristics 0.1.0.27) may crash
while it gives back its memory; so this process ends before it comes to that.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """For each shape a list: m, n and k of a tile, warps, stages, split, two of a cluster, seconds."""
    request = json.loads(sys.stdin.read())
    library: Any = importlib.import_module(request["package"])
    # y (m, n) = x (m, k) @ weight (n, k).T, rows side by side.
    layout = library.NvMatmulHeuristicsMatmulLayout.NT_ROW_MAJOR
    asked = library.NvMatmulHeuristicsInterface(
        backend=library.NvMatmulHeuristicsTarget[request["backend"]], precision=request["precision"]
    )
    device = asked.createHardwareDescriptor()
    asked.setHardwarePredefinedGpu(device, library.NvMatmulHeuristicsNvidiaGpu[request["gpu"]])
    asked.loadInternalDiscoverySet(layout, device)
    answers = []
    for m, n, k in request["shapes"]:
        found = asked.get_with_mnk(m, n, k, layout, request["count"], device)
        answers.append([_plain(each["kernel"], each["runtime"]) for each in found])
    sys.stdout.write(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)


def _plain(kernel: Any, seconds: float) -> list[float]:
    warps = (kernel.cta_tile_m // kernel.warp_tile_m) * (kernel.cta_tile_n // kernel.warp_tile_n)
    tile = [kernel.cta_tile_m, kernel.cta_tile_n, kernel.cta_tile_k]
    return [*tile, warps, kernel.stages, kernel.split_k, kernel.cluster_m, kernel.cluster_n, seconds]


if __name__ == "__main__":
    main()
