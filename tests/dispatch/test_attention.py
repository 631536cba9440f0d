"""``attention`` as served: ``F.scaled_dot_product_attention`` itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Problem

H, D = 4, 8
CAST, MATMUL, SDPA = "torch.sdpa_cast", "torch.matmul_attention", "torch.sdpa"
SHAPES = [{"h": H, "hkv": H, "d": D}, {"h": H, "hkv": 2, "d": D}]


def heads(b: int, s: int, h: int = H, d: int = D, layout: str = "bshd", dtype: torch.dtype = torch.float32) -> Any:
    if layout == "bhsd":
        return torch.randn(b, h, s, d).to(dtype)
    return torch.randn(b, s, h, d).to(dtype).transpose(1, 2)


def qkv(b: int = 2, q: int = 5, kv: int | None = None, hkv: int = H, **options: Any) -> tuple[Any, ...]:
    kv = q if kv is None else kv
    return heads(b, q, **options), heads(b, kv, hkv, **options), heads(b, kv, hkv, **options)


def keys_hidden(b: int = 2, q: int = 5, kv: int = 5) -> torch.Tensor:
    mask = torch.ones(b, 1, q, kv, dtype=torch.bool)
    mask[0, ..., kv // 2 :] = False
    return mask


Case = tuple[tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: (qkv(), {}),
    "bhsd": lambda: (qkv(layout="bhsd"), {}),
    "one query": lambda: (qkv(q=1, kv=7), {}),
    "scaled": lambda: (qkv(), {"scale": 0.5}),
    "scale 0": lambda: (qkv(), {"scale": 0.0}),
    "causal": lambda: (qkv(), {"is_causal": True}),
    "causal, more keys": lambda: (qkv(q=3, kv=7), {"is_causal": True}),
    "bool mask": lambda: (qkv(), {"attn_mask": keys_hidden()}),
    "a row without keys": lambda: (qkv(), {"attn_mask": (torch.arange(5) < 4).view(5, 1).expand(5, 5)}),
    "float mask": lambda: (qkv(), {"attn_mask": torch.randn(5, 5)}),
    "mask of a head": lambda: (qkv(), {"attn_mask": torch.randn(2, H, 5, 5)}),
    "mask 1-d": lambda: (qkv(), {"attn_mask": torch.randn(5)}),
    "mask wants gradients": lambda: (qkv(), {"attn_mask": torch.randn(5, 5, requires_grad=True)}),
    "wrong mask": lambda: (qkv(), {"attn_mask": torch.randn(4, 4)}),
    "mask of int": lambda: (qkv(), {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    "mask of float64": lambda: (qkv(), {"attn_mask": torch.randn(5, 5, dtype=torch.float64)}),
    "mask is a list": lambda: (qkv(), {"attn_mask": [1]}),
    "mask and causal": lambda: (qkv(), {"attn_mask": keys_hidden(), "is_causal": True}),
    "grouped": lambda: (qkv(hkv=2), {"enable_gqa": True}),
    "grouped and masked": lambda: (qkv(hkv=2), {"enable_gqa": True, "attn_mask": keys_hidden()}),
    "grouped, not said": lambda: (qkv(hkv=2), {}),
    "grouped in three": lambda: (qkv(hkv=3), {"enable_gqa": True}),
    "one key head, not said": lambda: (qkv(hkv=1), {}),
    "bf16": lambda: (qkv(dtype=torch.bfloat16), {}),
    "bf16, float mask": lambda: (qkv(dtype=torch.bfloat16), {"attn_mask": torch.randn(5, 5).bfloat16()}),
    "float16": lambda: (qkv(dtype=torch.float16), {}),
    "float64": lambda: (qkv(dtype=torch.float64), {}),
    "mixed": lambda: ((heads(2, 5), heads(2, 5, dtype=torch.bfloat16), heads(2, 5)), {}),
    "other layouts": lambda: ((heads(2, 5), heads(2, 5, layout="bhsd"), heads(2, 5)), {}),
    "3-d": lambda: (tuple(torch.randn(3, 5, D) for _ in range(3)), {}),
    "2-d": lambda: (tuple(torch.randn(5, D) for _ in range(3)), {}),
    "other value size": lambda: ((heads(2, 5), heads(2, 5), heads(2, 5, d=16)), {}),
    "wrong key size": lambda: ((heads(2, 5), heads(2, 5, d=16), heads(2, 5)), {}),
    "wrong batch": lambda: ((heads(2, 5), heads(3, 5), heads(3, 5)), {}),
    "broadcast batch": lambda: ((heads(2, 5), heads(1, 5), heads(1, 5)), {}),
    "expanded batch": lambda: ((heads(2, 5), heads(1, 5).expand(2, H, 5, D), heads(1, 5).expand(2, H, 5, D)), {}),
    "no queries": lambda: ((heads(2, 0), heads(2, 5), heads(2, 5)), {}),
    "no keys": lambda: ((heads(2, 5), heads(2, 0), heads(2, 0)), {}),
    "strided d": lambda: ((torch.randn(2, H, D, 5).transpose(2, 3),) * 3, {}),
    "meta": lambda: (tuple(t.to("meta") for t in qkv()), {}),
    "None": lambda: ((heads(2, 5), None, heads(2, 5)), {}),
    "wants gradients": lambda: ((heads(2, 5).requires_grad_(), heads(2, 5), heads(2, 5)), {}),
    "negative dropout": lambda: (qkv(), {"dropout_p": -0.5}),
    "unknown heads": lambda: (tuple(heads(2, 5, h=3) for _ in range(3)), {}),
    "past the bins": lambda: (qkv(b=1, q=300), {}),
}  # fmt: skip


def outcome(call: Callable[[], torch.Tensor]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(found: Any, wanted: Any, tolerance: float = 3e-2) -> None:
    if isinstance(wanted, type):
        assert found is wanted, f"found {found}, expected {wanted}"
        return
    assert isinstance(found, torch.Tensor), f"found {found}, expected a result"
    assert (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, wanted.device)
    assert found.requires_grad == wanted.requires_grad
    if wanted.device.type == "cpu":
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def counts(runtime: Any) -> dict[str, int]:
    ops = runtime.stats()["ops"].get("attention", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.fixture(params=[(MATMUL, CAST), (CAST,), (SDPA,)], ids=["matmul", "cast", "sdpa"])
def runtime(route: Any, request: Any) -> Any:
    return route("attention", request.param, SHAPES)


@pytest.mark.parametrize("case", CASES)
def test_call_is_the_frameworks(runtime: Any, case: str) -> None:
    args, options = CASES[case]()
    wanted = outcome(lambda: F.scaled_dot_product_attention(*args, **options))
    assert_same(outcome(lambda: runtime.server("attention").call(*args, **options)), wanted)
    if not isinstance(wanted, type):
        assert sum(counts(runtime).values()) == 1, "each call that returned is counted once"


def test_every_candidate_in_turn(route: Any) -> None:
    for candidate in pool.candidates_for("attention", "cpu"):
        if pool.kernels()[candidate.kernel].unavailable() is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            runtime = route("attention", (candidate.id,), SHAPES)
            args = qkv(q=1 if candidate.kernel.startswith("tile.decode") else 5, kv=5, dtype=dtype)
            copies = [t.clone() for t in args]
            y = runtime.server("attention").call(*args)
            assert_same(y, F.scaled_dot_product_attention(*args))
            assert counts(runtime) == {"bin": 1}
            assert all(torch.equal(t, c) for t, c in zip(args, copies, strict=True))


def test_dropout_is_the_frameworks(runtime: Any) -> None:
    args = qkv()
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(*args, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(runtime.server("attention").call(*args, dropout_p=0.5), wanted)
    assert counts(runtime) == {"dropout": 1}


def test_derivatives_transforms_and_modes(runtime: Any) -> None:
    call = runtime.server("attention").call
    args = [t.detach().clone().requires_grad_() for t in qkv()]
    results = []
    for f in (call, F.scaled_dot_product_attention):
        first = torch.autograd.grad(f(*args).pow(2).sum(), args, create_graph=False)
        results.append(first)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    plain = [t.detach() for t in args]
    assert torch.allclose(torch.vmap(call)(*(torch.stack((t, t)) for t in plain))[0], call(*plain), atol=3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*plain).dtype == F.scaled_dot_product_attention(*plain).dtype
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    served = counts(runtime).get("bin", 0)
    assert torch.equal(compiled(*plain), call(*plain))
    assert {"gradient", "transformed", "autocast"} <= set(counts(runtime))
    assert counts(runtime)["bin"] == served + 2


def test_offset_views_keep_their_alignment_class(route: Any) -> None:
    runtime = route("attention", (CAST,), SHAPES)
    group = runtime.generation.table.groups[0]
    assert min(group.cells) == 4
    buffer = torch.randn(2 * 5 * H * D + 1)
    q = buffer[1:].view(2, 5, H, D).transpose(1, 2)
    assert_same(runtime.server("attention").call(q, q, q), F.scaled_dot_product_attention(q, q, q))
    assert counts(runtime) == {"bin": 1}


@pytest.mark.parametrize(
    "kernel", [k for k in pool.kernels_for("attention", "cuda") if "sdpa_" in k.id and k.devices]
)
def test_a_gpus_backends_are_called_as_their_operators_are_declared(kernel: Kernel) -> None:
    """On tensors without memory: shapes, dtypes and arguments are checked by PyTorch, nothing is computed."""
    hkv = 8 if "takes as many key heads" in (kernel.objection(backends_problem(2)) or "") else 2
    problem = backends_problem(hkv)
    assert kernel.objection(problem) is None and kernel.runs_on("cuda") and not kernel.runs_on("cpu")
    q, k = (torch.empty(2, h, s, 64, dtype=torch.bfloat16, device="meta") for h, s in ((8, 16), (hkv, 24)))
    for keys in (k, k[:, :, :16]):
        y = kernel.bind(problem, ())(q, keys, keys, None, None)
        assert isinstance(y, torch.Tensor) and y.shape == q.shape and y.dtype is torch.bfloat16
    assert "mask" in (kernel.objection(backends_problem(hkv, mask="bool")) or "")


def backends_problem(hkv: int, mask: str = "none") -> Problem:
    traits = {"dtype": "bfloat16", "mask": mask, "causal": "yes", "layout": "bhsd"}
    return Problem.of("attention", traits, {"b": 2, "q": 16, "kv": 16, "h": 8, "hkv": hkv, "d": 64})
