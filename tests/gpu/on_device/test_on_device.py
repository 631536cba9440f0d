"""What runs on a GPU is right there: candidates, the package, views, streams, threads, graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import Gpu, placed
from bench.gpu_views import operators
from dks.dispatch import pool
from dks.dispatch.evidence import read_run
from dks.dispatch.gpu import embed
from dks.dispatch.gpu.launch import Library
from dks.dispatch.kernel import relative_error
from tests.gpu.on_device.conftest import Made

BF16 = 2e-2
OPERATORS = (
    *("linear", "linear_ragged", "rms_norm", "softmax", "silu_and_mul", "cross_entropy", "rotary"),
    *("attention", "paged_attention"),
)


def drawn(shapes: tuple[tuple[int, ...], ...], offset: int = 0) -> list[torch.Tensor]:
    plain = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    return [placed(t, offset) for t in plain]


def test_the_launcher_sees_the_device_that_torch_sees() -> None:
    found = Library(embed.launcher()).device(0)
    there = torch.cuda.get_device_properties(0)
    assert found.capability == 10 * there.major + there.minor
    assert found.multiprocessors == there.multi_processor_count


def test_no_candidate_is_wrong_and_none_breaks(made: Made) -> None:
    rows = read_run(made.run)
    bad = {"wrong_result", "failed", "crashed", "timeout", "out_of_memory", "not_compiled"}
    # A kernel may have to look at values on the host, which no graph can hold: torch.paged_loop_sdpa does.
    rows = [row for row in rows if "can't be captured" not in row.reason]
    found = [f"{row.problem} {row.candidate}: {row.status}: {row.reason}" for row in rows if row.status in bad]
    assert not found, "\n".join(found)


def test_compiled_kernels_of_every_operator_took_part(made: Made) -> None:
    rows = read_run(made.run)
    for op in {row.op for row in rows}:
        ours = [
            each.id for each in pool.kernels_for(op) if each.devices == ("cuda",) and each.id.startswith("triton.")
        ]
        ran = {row.candidate.partition("/")[0] for row in rows if row.op == op and row.status == "ok"}
        assert not ours or ran & set(ours), f"none of {ours} ran"


@pytest.mark.parametrize("offset", [0, 2, 4, 8, 16])
@pytest.mark.parametrize("op", OPERATORS)
def test_answers_are_torchs_wherever_the_inputs_begin(made: Made, op: str, offset: int) -> None:
    shapes, framework, ours = operators(made.package)[op]
    inputs = drawn(shapes, offset)
    wanted, y = framework(*inputs), ours(*inputs)
    if isinstance(y, tuple):  # rotary's k is turned as its q is
        wanted, y = (torch.cat([part.flatten() for part in both]) for both in (wanted, y))  # type: ignore[attr-defined]
    assert isinstance(y, torch.Tensor) and isinstance(wanted, torch.Tensor)
    assert y.shape == wanted.shape and y.dtype == wanted.dtype
    assert relative_error(y, wanted.double()) < BF16


@pytest.mark.parametrize("m", [1, 2, 3, 7, 17, 128, 129, 1000])
@pytest.mark.parametrize("shape", [(512, 256), (510, 250)])
def test_a_prepared_linear_at_any_number_of_rows(made: Made, m: int, shape: tuple[int, int]) -> None:
    (x, weight) = drawn(((m, shape[1]), shape))
    layer = made.package.prepare_linear(weight)
    with torch.no_grad():
        assert relative_error(layer(x), (x.double() @ weight.double().T)) < BF16


def test_a_layer_is_captured_and_replayed_on_other_values(made: Made) -> None:
    x, weight = drawn(((128, 256), (512, 256)))
    layer = made.package.prepare_linear(weight)
    gpu = Gpu()
    with torch.no_grad():
        replay = gpu.capture(lambda: layer(x))
        x.copy_(torch.randn_like(x))
        y = replay()
        gpu.wait()
    assert isinstance(y, torch.Tensor) and relative_error(y, F.linear(x, weight).double()) < BF16


def on_a_stream(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The answer of a call that must wait for what its stream was doing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = call()
    stream.synchronize()
    return y


def test_calls_are_enqueued_on_the_current_stream(made: Made) -> None:
    x, weight = drawn(((128, 256), (512, 256)))
    layer = made.package.prepare_linear(weight)
    later = torch.zeros_like(x)

    def call() -> torch.Tensor:
        for _ in range(50):  # work that another stream would not wait for
            torch.randn(4096, 4096, device="cuda")
        later.copy_(x)
        return layer(later)

    with torch.no_grad():
        assert relative_error(on_a_stream(call), F.linear(x, weight).double()) < BF16


def test_threads_each_with_a_stream(made: Made) -> None:
    x, weight = drawn(((128, 256), (512, 256)))
    layer = made.package.prepare_linear(weight)
    wanted = F.linear(x, weight).double()
    errors: list[float] = []

    def work() -> None:
        with torch.no_grad():
            errors.extend(relative_error(on_a_stream(lambda: layer(x)), wanted) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 200 and max(errors) < BF16


def test_times_of_the_device_are_plausible() -> None:
    gpu = Gpu()
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ns = min(gpu.device(lambda: target.copy_(source)) for _ in range(5))
    assert 1e11 < 2 * source.nbytes / (ns * 1e-9) < 2e13, "between 0.1 and 20 TB/s"
    (small,) = drawn(((16, 16),))
    assert min(gpu.eager(lambda: small + 1) for _ in range(20)) > min(
        gpu.device(lambda: small + 1) for _ in range(20)
    )
