"""What proposals of NVIDIA's matmul heuristics do to a sweep, with a stand-in for the package."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from dks.dispatch.environment import Environment
from dks.dispatch.gpu import matmul
from dks.dispatch.gpu.cutlass.configuration import configurations
from dks.dispatch.gpu.matmul_params import tile
from dks.dispatch.kernel import Params
from dks.dispatch.problem import Candidate, Problem
from dks.profiler import seeds
from dks.profiler.config import Measure, OperatorSweep, Sweep
from dks.profiler.problems import WeightedProblem
from dks.profiler.seeds import NoSeeds, Ranked, Shape, Tile, distance, expressed, lacking, ordered, seeded, tile_of

H200 = Environment("cuda", "NVIDIA H200 132 SMs", "sm_90", "580", "2.11.0+cu130", "cuda-13.0", "none", "none", "")
OWN = (tile(128, 128, 64, 8, 4), tile(64, 64, 64, 4, 5), tile(16, 64, 128, 4, 4, split=8))
FOUND = Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)

STAND_IN = """
import enum, os

NvMatmulHeuristicsMatmulLayout = enum.IntEnum("Layout", "NN_ROW_MAJOR NT_ROW_MAJOR", start=0)
NvMatmulHeuristicsTarget = enum.IntEnum("Target", "TRITON CUTLASS3")
NvMatmulHeuristicsNvidiaGpu = enum.IntEnum("Gpu", "H200_SXM A100_SXM_80GB")


class Kernel:
    def __init__(self, m, n, k, warps_m, warps_n, stages, split):
        self.cta_tile_m, self.cta_tile_n, self.cta_tile_k = m, n, k
        self.warp_tile_m, self.warp_tile_n = m // warps_m, n // warps_n
        self.stages, self.split_k, self.cluster_m, self.cluster_n = stages, split, 1, 1


class NvMatmulHeuristicsInterface:
    def __init__(self, backend, precision):
        assert (backend.name, precision) == ("TRITON", "TST")

    def createHardwareDescriptor(self):
        return {}

    def setHardwarePredefinedGpu(self, device, gpu):
        device["gpu"] = gpu.name

    def loadInternalDiscoverySet(self, layout, device):
        device["layout"] = layout.name

    def get_with_mnk(self, m, n, k, layout, count, device):
        assert device == {"gpu": "H200_SXM", "layout": "NT_ROW_MAJOR"} and layout.name == "NT_ROW_MAJOR"
        assert count == 16
        if n == 13:
            os.abort()
        slow, fast = Kernel(128, 128, 64, 2, 4, 3, 1), Kernel(64, 64, 64, 2, 2, 5, m)
        return [{"kernel": slow, "runtime": 2e-5}, {"kernel": fast, "runtime": 1e-5}]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{seeds.PACKAGE}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))


def problem(m: int, n: int, k: int, dtype: str = "bfloat16", weight: float = 1.0) -> WeightedProblem:
    traits = {"dtype": dtype, "bias": "no", "epilogue": "none"}
    return WeightedProblem(Problem.of("linear", traits, {"m": m, "n": n, "k": k}), weight)


def sweep_of(*problems: WeightedProblem, patterns: tuple[str, ...] = ("*",)) -> Sweep:
    kernels = (("torch.linear", ((),)), ("triton.matmul", OWN), ("triton.gemv", ((),)))
    candidates = tuple(Candidate(kernel, params) for kernel, sets in kernels for params in sets)
    part = OperatorSweep("linear", problems, candidates, {}, patterns=patterns)
    return Sweep("test", "cuda:0", None, None, (part,), Measure(), Path("test.yaml"))


def always(backend: str, precision: str, gpu: str, shapes: object) -> list[Ranked]:
    assert (backend, precision, gpu) == ("TRITON", "TST", "H200_SXM")
    return [FOUND for _ in shapes]  # type: ignore[attr-defined]


def tiles_of(sweep: Sweep) -> list[Params]:
    return [each.params for each in sweep.operators[0].candidates if each.kernel == "triton.matmul"]


def quiet(text: str) -> None:
    raise AssertionError(text)


def test_proposals_come_from_a_process_best_first(package: None) -> None:
    found = seeds.propose("TRITON", "TST", "H200_SXM", [(3, 64, 64), (1, 64, 64)])
    assert found[0] == [Tile(64, 64, 64, 4, 5, 3), Tile(128, 128, 64, 8, 3, 1)]
    assert found[1][0].split == 1


def test_what_the_package_does_wrong_is_said(package: None, tmp_path: Path) -> None:
    with pytest.raises(NoSeeds, match="its process ended with -6"):
        seeds.propose("TRITON", "TST", "H200_SXM", [(3, 13, 64)])
    with pytest.raises(NoSeeds, match="KeyError: 'B200'"):
        seeds.propose("TRITON", "TST", "B200", [(3, 64, 64)])
    path = tmp_path / f"{seeds.PACKAGE}.py"
    path.write_text(STAND_IN.replace("128, 128, 64, 2, 4, 3, 1", "128, 128, 64, 2, 4, 0, 1"))
    with pytest.raises(NoSeeds, match=r"ValueError: found .*, expected sizes"):
        seeds.propose("TRITON", "TST", "H200_SXM", [(3, 64, 64)])
    path.write_text("print('hello')\n" + STAND_IN)
    with pytest.raises(NoSeeds, match="JSONDecodeError"):
        seeds.propose("TRITON", "TST", "H200_SXM", [(3, 64, 64)])


def test_the_nearest_come_first_and_ties_keep_our_order() -> None:
    assert distance(Tile(128, 64, 32), Tile(64, 128, 32, 8, 3)) == 2
    assert distance(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 8, 4, 2)) == 2
    assert ordered(OWN, tile_of, [(1.0, [Tile(64, 64, 64, 4, 5)])])[0] == OWN[1]
    assert ordered(OWN, tile_of, [(1.0, [Tile(64, 64, 64, 4, 5)]), (9.0, [tile_of(OWN[2])])])[0] == OWN[2]
    both = [tile_of(OWN[2]), tile_of(OWN[0])]
    assert ordered(OWN, tile_of, [(1.0, both)]) == [OWN[2], OWN[0], OWN[1]]
    assert ordered(OWN, tile_of, []) == ordered(OWN, tile_of, [(1.0, [])]) == list(OWN)


def test_kernels_of_cutlass_are_ordered_by_its_own_proposals() -> None:
    found = [each for each in configurations(90, ("bfloat16",)) if not each.multistage]
    wanted = Tile(128, 256, 64, 8, 4, cluster=(1, 2))
    first = ordered(found, seeds.tile_of_cutlass, [(1.0, [wanted])])[0]
    assert (first.tile, first.cluster) == ((128, 256, 64), (1, 2, 1))
    multistage = [each for each in configurations(80, ("bfloat16",)) if each.align == 16]
    first = ordered(multistage, seeds.tile_of_cutlass, [(1.0, [Tile(64, 64, 64, 4, 5)])])[0]
    assert (first.tile, first.stages) == ((64, 64, 64), 5)


@pytest.mark.parametrize(
    ("proposal", "shape", "made"),
    [
        (Tile(64, 128, 32, 4, 6), (512, 4096, 4096), tile(64, 128, 32, 4, 6)),
        (Tile(64, 64, 64, 4, 5, 3), (64, 256, 4096), tile(64, 64, 64, 4, 5, split=3)),
        (Tile(64, 64, 64, 4, 1), (512, 4096, 4096), tile(64, 64, 64, 4, 2)),
        (Tile(96, 128, 32, 4, 4), (512, 4096, 4096), None),
        (Tile(8, 128, 64, 4, 4), (8, 4096, 4096), None),
        (Tile(256, 256, 64, 4, 2), (4096, 4096, 4096), None),
        (Tile(256, 128, 64, 8, 8), (4096, 4096, 4096), None),
        (Tile(128, 128, 64, 8, 4), (16, 4096, 4096), None),
    ],
    ids=str,
)
def test_a_proposal_is_a_parameter_set_or_none(proposal: Tile, shape: Shape, made: Params | None) -> None:
    assert expressed(proposal, "bfloat16", 90, shape) == made
    if made is not None:
        assert matmul.matmul("bfloat16", made, 16)
        assert Candidate.parse(Candidate("triton.matmul", made).id).params == made
        assert [name for name, _ in made] == [name for name, _ in matmul.PARAMS[0]]


def test_what_most_traffic_wants_first_is_added_and_not_too_much() -> None:
    one, other = tile(32, 32, 64, 4, 3), tile(64, 32, 64, 4, 3)
    assert lacking(OWN, [(1.0, [one, OWN[0], one]), (3.0, [OWN[1], other])]) == [other, one]
    many = [tile(16, 16, 16 * 2**i, 4, 3) for i in range(seeds.MOST_ADDED + 3)]
    assert lacking([], [(1.0, many)]) == many[: seeds.MOST_ADDED]


def test_a_sweep_keeps_all_that_it_had(package: None) -> None:
    sweep = sweep_of(problem(512, 4096, 4096))
    made = seeded(sweep, H200, quiet, always)
    added = tile(64, 128, 64, 4, 4)
    assert tiles_of(made)[:2] == [added, tile(64, 64, 64, 4, 4)]
    assert set(tiles_of(made)) == {*OWN, added, tile(64, 64, 64, 4, 4)}
    before, after = (each.operators[0].candidates for each in (sweep, made))
    assert [each.kernel for each in after] == ["torch.linear", *["triton.matmul"] * 5, "triton.gemv"]
    assert set(before) < set(after) and replace(made, operators=sweep.operators) == sweep


def test_only_what_the_config_asks_for_is_added(package: None) -> None:
    sweep = sweep_of(problem(512, 4096, 4096), patterns=("triton.matmul/bm64-bn64*",))
    made = seeded(sweep, H200, quiet, always)
    assert set(tiles_of(made)) - set(OWN) == {tile(64, 64, 64, 4, 4)}


def test_the_package_is_asked_for_each_dtype(package: None) -> None:
    asked = []

    def ask(backend: str, precision: str, gpu: str, shapes: object) -> list[Ranked]:
        asked.append((precision, list(shapes)))  # type: ignore[call-overload]
        return [FOUND for _ in shapes]  # type: ignore[attr-defined]

    seeded(
        sweep_of(problem(8, 64, 64), problem(9, 64, 64, "float16"), problem(1, 1, 1, "float32")), H200, quiet, ask
    )
    assert asked == [("TST", [(8, 64, 64)]), ("HSH", [(9, 64, 64)])]


def test_without_an_answer_our_own_list_stays_and_it_is_said_once(
    package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, said = sweep_of(problem(512, 4096, 4096)), list[str]()

    def fails(*_: object) -> list[Ranked]:
        raise NoSeeds("it took more than 120 s")

    own = "tiles come from our own list alone: nvidia-matmul-heuristics"
    assert (
        seeded(sweep, H200, said.append, fails) is sweep and said.pop() == f"{own} failed: it took more than 120 s"
    )
    other = replace(H200, arch="NVIDIA Thor", isa="sm_110")
    assert seeded(sweep, other, said.append, always) is sweep and said.pop() == f"{own} knows no NVIDIA Thor"
    monkeypatch.setattr(seeds, "find_spec", lambda _: None)
    assert seeded(sweep, H200, said.append, always) is sweep
    assert said.pop() == f"{own}, which proposes some, is not installed" and not said
    cpu = replace(H200, device="cpu", isa="avx512")
    assert seeded(sweep, cpu, quiet, always) is sweep
    tileless = replace(sweep.operators[0], candidates=sweep.operators[0].candidates[:1])
    only = replace(sweep, operators=(tileless,))
    assert seeded(only, H200, quiet, always) is only


@pytest.mark.parametrize(
    ("name", "isa", "gpu"),
    [
        ("NVIDIA H200 132 SMs", "sm_90", "H200_SXM"),
        ("NVIDIA H100 PCIe 114 SMs", "sm_90", "H100_PCIE"),
        ("NVIDIA H100 80GB HBM3 132 SMs", "sm_90", "H100_SXM"),
        ("NVIDIA A100-SXM4-40GB 108 SMs", "sm_80", "A100_SXM_80GB"),
        ("NVIDIA A10 72 SMs", "sm_86", "A10_PCIE"),
        ("NVIDIA L40S 142 SMs", "sm_89", "L40S"),
        ("NVIDIA GeForce RTX 4070", "sm_89", "L40S"),
        ("NVIDIA B200 148 SMs", "sm_100", "B200"),
        ("NVIDIA Thor", "sm_110", None),
    ],
)
def test_a_device_has_a_name(name: str, isa: str, gpu: str | None) -> None:
    assert seeds.gpu_of(replace(H200, arch=name, isa=isa)) == gpu


@pytest.mark.skipif(
    importlib.util.find_spec(seeds.PACKAGE) is None, reason="nvidia-matmul-heuristics is not installed"
)
def test_the_package_itself_proposes_tiles_that_we_can_make() -> None:
    shapes = [(16, 4096, 4096), (512, 4096, 4096), (8192, 8192, 8192)]
    for dtype, precision in seeds.PRECISIONS.items():
        for shape, found in zip(shapes, seeds.propose("TRITON", precision, "H200_SXM", shapes), strict=True):
            assert found, (dtype, shape)
        assert any(expressed(each, dtype, 90, shapes[-1]) for each in found)
    assert seeds.propose("CUTLASS3", "TST", "H200_SXM", shapes)[1][0].cluster != (1, 1)
