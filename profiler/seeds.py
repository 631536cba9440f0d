"""Tiles of linear that NVIDIA's matmul heuristics would try first: an order, and tiles that our lists lack.

The package (nvidia-matmul-heuristics, the extra ``seed``) models a device without having one. It knows neither
alignment nor our kernels, and many of its ranks tie, so it never removes a candidate. Without it our own lists are
measured as they are.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from dks.dispatch.environment import Environment
from dks.dispatch.gpu import matmul
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.matmul_params import tile
from dks.dispatch.kernel import Params
from dks.dispatch.problem import Candidate
from dks.profiler.config import OperatorSweep, Sweep
from dks.profiler.problems import WeightedProblem

PACKAGE = "nvMatmulHeuristics"
CHILD = Path(__file__).parent / "seeds_child.py"
TIMEOUT = 120.0
COUNT = 16  # proposals for a problem; it seldom has more
MOST_ADDED = 8  # candidates of a kernel, those that most of the traffic would have first

KERNELS = {"triton.matmul": "", "triton.matmul_fp8": "float8_e4m3fn", "triton.matmul_int8": "int8"}
"""Kernels whose parameters are those of ``gpu/matmul.py``, by what x and the weight are quantised to."""

PRECISIONS = {"bfloat16": "TST", "float16": "HSH", "int8": "BII", "float8_e4m3fn": "QQTST"}
"""The package's word for a product, by dtype of x and the weight."""

_NAMES = (
    *(("H200", "H200_SXM"), ("H100 PCIe", "H100_PCIE"), ("H100 NVL", "H100_NVL"), ("H100", "H100_SXM")),
    *(("H20", "H20_SXM"), ("GB300", "GB300_NVL"), ("GB200", "GB200_NVL"), ("B200", "B200")),
    *(("A100-PCIE", "A100_PCIE_80GB"), ("A100", "A100_SXM_80GB"), ("A30", "A30_PCIE"), ("A40", "A40_PCIE")),
    *(("A10", "A10_PCIE"), ("L40S", "L40S"), ("L40", "L40"), ("L20", "L20"), ("L4", "L4")),
)
_BY_ARCH = {80: "A100_SXM_80GB", 86: "A40_PCIE", 89: "L40S", 90: "H100_SXM", 100: "B200", 103: "GB300_NVL"}

Shape = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes and how; 0 where it is not said.

    Attributes:
        m, n, k: its extents.
        warps, stages, split: of the block, of its pipeline, pieces of k.
        cluster: blocks that share what they load, along m and n.
    """

    m: int
    n: int
    k: int
    warps: int = 0
    stages: int = 0
    split: int = 1
    cluster: tuple[int, int] = (1, 1)


Ranked = Sequence[Tile]
"""What is proposed for one problem, best first."""

Propose = Callable[[str, str, str, Sequence[Shape]], list[Ranked]]


class NoSeeds(Exception):
    """The package gave no answer; the message says why."""


def propose(backend: str, precision: str, gpu: str, shapes: Sequence[Shape]) -> list[Ranked]:
    """The package's proposals for each shape (m, n, k), the fastest by its own estimate first.

    Args:
        backend: ``TRITON`` or ``CUTLASS3``.
        precision: one of ``PRECISIONS``.
        gpu: its name for a device; see ``gpu_of``.

    Raises:
        NoSeeds: it crashed, took too long, or said what is no proposal.
    """
    request = {"package": PACKAGE, "backend": backend, "precision": precision, "gpu": gpu}
    text = json.dumps({**request, "count": COUNT, "shapes": list(shapes)})
    command = [sys.executable, "-c", _RUN, str(CHILD)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
            raise NoSeeds(f"its process ended with {done.returncode}: {last[:300]}")
        answers = json.loads(done.stdout)
        if len(answers) != len(shapes):
            raise ValueError(f"{len(answers)} answers to {len(shapes)} shapes")
        return [[_tile(each) for each in sorted(answer, key=lambda each: float(each[-1]))] for answer in answers]
    except subprocess.TimeoutExpired:
        raise NoSeeds(f"it took more than {TIMEOUT:.0f} s") from None
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise NoSeeds(f"{type(error).__name__}: {error}") from None


# Else the file's own folder would come first among the places of modules, and hide others by its names.
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


def _tile(found: Sequence[float]) -> Tile:
    m, n, k, warps, stages, split, across, along = map(int, found[:8])
    if min(m, n, k, warps, stages, split, across, along) < 1:
        raise ValueError(f"found {found}, expected sizes")
    return Tile(m, n, k, warps, stages, split, (across, along))


def gpu_of(environment: Environment) -> str | None:
    """The package's name for a device, or for the one most like it that is known here; None where none is."""
    for part, name in _NAMES:
        if part in environment.arch:
            return name
    return _BY_ARCH.get(arch_of(environment))


def arch_of(environment: Environment) -> int:
    """Compute capability, ten times the major and once the minor number."""
    return int(environment.isa.removeprefix("sm_"))


def distance(one: Tile, other: Tile) -> float:
    """Doublings from one to the other, all that both say taken together."""
    pairs = [(one.m, other.m), (one.n, other.n), (one.k, other.k), (one.split, other.split)]
    pairs += [(one.warps, other.warps), (one.stages, other.stages), *zip(one.cluster, other.cluster, strict=True)]
    return sum(abs(math.log2(a / b)) for a, b in pairs if a and b)


def ordered(items: Iterable[T], tile_of: Callable[[T], Tile], proposals: Iterable[tuple[float, Ranked]]) -> list[T]:
    """The same items, those nearest to what is proposed first, and as they came where none is nearer.

    Args:
        proposals: of each problem, with its weight: distances are averaged over problems.
    """
    wanted = [(weight, ranked) for weight, ranked in proposals if ranked]

    def far(item: T) -> float:
        # A place in the ranking decides between proposals that are equally near.
        own = tile_of(item)
        return sum(w * min(distance(own, each) + i / 1000 for i, each in enumerate(ranked)) for w, ranked in wanted)

    return sorted(items, key=far)


def tile_of(params: Params) -> Tile:
    """The tile of a parameter set of ``gpu/matmul.py``."""
    p = dict(params)
    return Tile(p["bm"], p["bn"], p["bk"], p["w"], p["s"], p["split"])


def tile_of_cutlass(configuration: Configuration) -> Tile:
    """The tile of a CUTLASS kernel, whose proposals the backend ``CUTLASS3`` has."""
    m, n, k = configuration.tile
    warps = math.prod(configuration.warps)
    return Tile(m, n, k, warps, configuration.stages, cluster=configuration.cluster[:2])


def expressed(proposal: Tile, dtype: str, arch: int, shape: Shape) -> Params | None:
    """A proposal as a parameter set of ``gpu/matmul.py``, or None where it can't be one or can't be meant."""
    sizes = (proposal.m, proposal.n, proposal.k, proposal.warps)
    if any(size & (size - 1) for size in sizes) or min(sizes[:3]) < 16 or proposal.warps > 16:
        return None
    if proposal.m * proposal.n > 256 * 32 * proposal.warps:
        return None  # more sums than a thread has registers
    params = tile(*sizes[:3], proposal.warps, max(proposal.stages, 2), split=proposal.split)
    if matmul.impossible(dtype, params, arch) or matmul.suits(*shape, params):
        return None
    return params


def lacking(own: Iterable[Params], votes: Iterable[tuple[float, Sequence[Params]]]) -> list[Params]:
    """Parameter sets that are proposed and that we have not: those first that most of the traffic has first.

    Args:
        votes: of each problem its weight, and what is proposed for it, best first.
    """
    known, total = set(own), defaultdict[Params, float](float)
    for weight, sets in votes:
        for place, params in enumerate(dict.fromkeys(sets)):
            if params not in known:
                total[params] += weight / (1 + place)
    return sorted(total, key=lambda params: -total[params])[:MOST_ADDED]


def seeded(sweep: Sweep, environment: Environment, say: Callable[[str], None], ask: Propose = propose) -> Sweep:
    """The same sweep, with candidates of ``KERNELS`` in the order of the proposals, and some more of them.

    Args:
        environment: of the device that is measured.
        say: told in a sentence where our own lists stay as they are.
    """
    parts = {part.op: _kernels(part) for part in sweep.operators}
    if environment.device != "cuda" or not any(parts.values()):
        return sweep
    gpu = gpu_of(environment)
    if find_spec(PACKAGE) is None:
        say("tiles come from our own list alone: nvidia-matmul-heuristics, which proposes some, is not installed")
    elif gpu is None:
        say(f"tiles come from our own list alone: nvidia-matmul-heuristics knows no {environment.arch}")
    else:
        try:
            operators = tuple(
                _seeded(
                    part,
                    parts[part.op],
                    arch_of(environment),
                    lambda *asked: ask("TRITON", asked[0], gpu, asked[1]),
                )
                for part in sweep.operators
            )
            return replace(sweep, operators=operators)
        except NoSeeds as error:
            say(f"tiles come from our own list alone: nvidia-matmul-heuristics failed: {error}")
    return sweep


def _kernels(part: OperatorSweep) -> list[str]:
    """Its kernels that there are proposals for."""
    found = dict.fromkeys(each.kernel for each in part.candidates)
    return [kernel for kernel in found if kernel in KERNELS] if part.op == "linear" else []


def _seeded(
    part: OperatorSweep, kernels: Sequence[str], arch: int, ask: Callable[[str, Sequence[Shape]], list[Ranked]]
) -> OperatorSweep:
    made = {kernel: _candidates(part, kernel, arch, ask) for kernel in kernels}
    candidates: list[Candidate] = []
    for each in part.candidates:  # all of a kernel where its first one was
        candidates += [each] if each.kernel not in made else []
        candidates += made.get(each.kernel, []) if each == _first(part, each.kernel) else []
    return replace(part, candidates=tuple(candidates))


def _first(part: OperatorSweep, kernel: str) -> Candidate:
    return next(each for each in part.candidates if each.kernel == kernel)


def _candidates(
    part: OperatorSweep, kernel: str, arch: int, ask: Callable[[str, Sequence[Shape]], list[Ranked]]
) -> list[Candidate]:
    """What is measured of one kernel, in order."""
    by_dtype: Mapping[str, list[WeightedProblem]] = defaultdict(list)
    for problem in part.problems:
        dtype = KERNELS[kernel] or problem.problem.trait("dtype")
        if dtype in PRECISIONS:
            by_dtype[dtype].append(problem)
    own = [each.params for each in part.candidates if each.kernel == kernel]
    ranked: list[tuple[float, Ranked]] = []
    votes: list[tuple[float, list[Params]]] = []
    for dtype, problems in by_dtype.items():
        shapes = [_shape(each) for each in problems]
        for problem, shape, found in zip(problems, shapes, ask(PRECISIONS[dtype], shapes), strict=True):
            ranked.append((problem.weight, found))
            sets = (expressed(each, dtype, arch, shape) for each in found)
            votes.append((problem.weight, [params for params in sets if params is not None]))
    added = [Candidate(kernel, params) for params in lacking(own, votes)]
    asked_for = [each for each in added if any(fnmatchcase(each.id, pattern) for pattern in part.patterns)]
    return [
        Candidate(kernel, params) for params in ordered([*own, *(c.params for c in asked_for)], tile_of, ranked)
    ]


def _shape(each: WeightedProblem) -> Shape:
    return each.problem.dim("m"), each.problem.dim("n"), each.problem.dim("k")
