"""What the tests of the dot-product and the tile kernels share: packing, calling in fenced memory, references."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import gelu, pad, relu, silu

from dks.dispatch.compiler import find_compiler
from dks.dispatch.tiles import build, library
from dks.dispatch.tiles.isa import ISAS
from dks.dispatch.tiles.unit import Unit

NONE, RELU, GELU, GELU_TANH, SILU, ADD = range(6)
EXACT = (NONE, RELU, ADD)
EMULATE = ("DKS_EMULATE",)
GUARD = 128  # bytes around y
MOST_INPUTS = 2**17  # of an int8 linear

_AFTER = {
    NONE: lambda v: v,
    RELU: relu,
    GELU: gelu,
    GELU_TANH: lambda v: gelu(v, approximate="tanh"),
    SILU: silu,
}


@dataclass(frozen=True)
class Form:
    """A unit, its x and y dtype, and how its weights are packed."""

    unit: Unit
    x: torch.dtype
    weight: torch.dtype
    panel: int
    group: int
    step: int

    def __str__(self) -> str:
        return self.unit.symbol


@dataclass(frozen=True)
class Layer:
    """A linear's constants: weight (n, k), scale (n,) for int8, bias (n,) float32."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def drawn(cls, form: Form, n: int, k: int, bias: bool = True) -> Layer:
        wide = torch.randn(n) if bias else None
        if form.weight != torch.int8:
            return cls((torch.randn(n, k) / k**0.5).to(form.weight), None, wide)
        return cls(torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 100 + 1e-4, wide)


def units_of(monkeypatch: pytest.MonkeyPatch, folder: str, forms: list[Form]) -> None:
    """Compile the units of ``forms`` into ``folder``, or skip where this machine can't run or build them."""
    reason = ISAS["avx512"].unavailable() or find_compiler()[1]
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(build.CACHE, folder)
    monkeypatch.setattr(library, "_locate", build.locate)
    assert build.build(form.unit for form in forms) == {}


def fenced(t: torch.Tensor, align: int = 1) -> torch.Tensor:
    """A copy that ends where readable memory ends, but for what ``align`` bytes need: reading on crashes."""
    size = t.numel() * t.element_size()
    page = mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0) == 0
    start = (whole - size) // align * align
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
    return copy.copy_(t)


def panels(form: Form, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` (n, k) as ``abi.h`` says, 64-byte aligned."""
    weight = pad(weight, (0, -weight.shape[1] % form.step, 0, -weight.shape[0] % form.panel))
    inside = weight.view(-1, form.panel, weight.shape[1] // form.group, form.group)
    return fenced(inside.permute(0, 2, 1, 3).contiguous(), 64)


@dataclass
class Call:
    """How a layer is called."""

    epilogue: int = NONE
    threads: int = 1
    by_rows: bool = False
    x_offset: int = 0  # bytes before the end of memory, where x ends
    y_offset: int = 0  # bytes after a cache line, where y starts


def run(
    form: Form, layer: Layer, x: torch.Tensor, residual: torch.Tensor | None, call: Call
) -> torch.Tensor | None:
    """y, or None where the kernel declines. Nothing around y may change."""
    n, k = layer.weight.shape
    sums = layer.weight.sum(1, dtype=torch.int32) if layer.weight.dtype == torch.int8 else None
    constants = [None if t is None else fenced(t) for t in (layer.bias, layer.scale, sums)]
    packed = panels(form, layer.weight)
    pointers = [None if t is None else t.data_ptr() for t in constants]
    linear = library.Linear(packed.data_ptr(), *pointers, n, k, call.epilogue, call.threads, call.by_rows)
    x = fenced(torch.cat([x.flatten(), x.new_zeros(call.x_offset // x.element_size())]))
    beside = None if residual is None else fenced(residual)
    size = x.element_size()
    m = (x.numel() - call.x_offset // size) // k
    memory = torch.full((2 * GUARD + 64 + m * n * size,), 0xA5, dtype=torch.uint8)
    start = GUARD + -memory.data_ptr() % 64 + call.y_offset
    end = start + m * n * size
    status = library.function(form.unit)(
        ctypes.addressof(linear),
        x.data_ptr(),
        None if beside is None else beside.data_ptr(),
        memory.data_ptr() + start,
        m,
    )
    assert (memory[:start] == 0xA5).all() and (memory[end:] == 0xA5).all()
    if status in library.DECLINED:
        return None
    assert status == library.OK
    return memory[start:end].clone().view(form.x).view(m, n)


def check(form: Form, layer: Layer, x: torch.Tensor, call: Call) -> torch.Tensor:
    """Call it, compare with the reference, and return y."""
    residual = torch.randn(x.shape[0], layer.weight.shape[0]).to(form.x) if call.epilogue == ADD else None
    y = run(form, layer, x, residual, call)
    assert y is not None
    what = f"{form} {tuple(x.shape)} {tuple(layer.weight.shape)} {call}"
    sums = (
        integer_linear(x, layer) if layer.scale is not None else x.bfloat16().double() @ layer.weight.double().t()
    )
    if layer.bias is not None:
        sums = sums + layer.bias
    if layer.scale is not None and call.epilogue in EXACT:
        wanted = sums + residual.float() if residual is not None else _AFTER[call.epilogue](sums)
        assert torch.equal(y, wanted.to(form.x)), what
        return y
    wanted = sums.double() + residual.double() if residual is not None else _AFTER[call.epilogue](sums.double())
    slack = 2e-6 * (1 + sums.double().abs())  # of an activation
    if layer.scale is None:
        slack += 1e-5 * (x.double().abs() @ layer.weight.double().abs().t() + 1)
    if form.x == torch.bfloat16:
        slack += wanted.abs() / 256
    assert ((y.double() - wanted).abs() <= slack).all(), what
    return y


def integer_linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What an int8 kernel computes before bias and activation, operation by operation in float32."""
    assert layer.scale is not None
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    lift = torch.where(largest < 1e-30, 2.0**64, 1.0).float()
    # A number divided by a tensor would be multiplied by its reciprocal.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / (largest * lift), 0.0)
    sums = (x * lift * inverse).round().double() @ layer.weight.double().t()  # exact: below 2^53
    return sums.float() * layer.scale * torch.tensor(1 / 127) * largest


def check_every_small_shape(form: Form) -> None:
    """Every m, n and k from 1 to 70, in a few random combinations, with every epilogue and sharing of work."""
    random.seed(1)
    torch.manual_seed(1)
    calls = itertools.product(range(6), (1, 2, 3), (False, True), (True, False))
    kinds = itertools.cycle(random.sample(list(calls), 72))
    for _ in range(3):
        for m, n, k in zip(*(random.sample(range(1, 71), 70) for _ in "mnk"), strict=True):
            epilogue, threads, by_rows, bias = next(kinds)
            x = torch.randn(m, k).to(form.x)
            check(form, Layer.drawn(form, n, k, bias), x, Call(epilogue, threads, by_rows))


def check_any_alignment(form: Form) -> None:
    """x and y at every offset of whole elements within a cache line give the same bits."""
    torch.manual_seed(2)
    size = torch.empty(0, dtype=form.x).element_size()
    for m, n, k in ((19, 37, 64), (5, 70, 33)):
        layer, x = Layer.drawn(form, n, k), torch.randn(m, k).to(form.x)
        first = check(form, layer, x, Call())
        for offset in range(0, 64, size):
            y = run(form, layer, x, None, Call(x_offset=offset, y_offset=64 - size - offset))
            assert y is not None and torch.equal(y, first), f"{form} {offset}"


def check_int8_extremes(form: Form) -> None:
    """Rows of zeros, denormals and the largest values each get a scale of their own; k as long as it may be."""
    torch.manual_seed(3)
    x = torch.randn(9, 70)
    x[0] = 0
    x[1] *= 3e-39
    x[2] = torch.tensor([1e-45, -2e-45] * 35)
    x[3] *= 1e37 / x[3].abs().amax()
    x[4, 1:] = 0
    x[5] *= 1e-37
    x[6] = -x[6].abs()
    x[7] *= torch.finfo(torch.bfloat16).max / x[7].abs().amax()  # its sums may be infinite, and nothing else
    x = x.to(form.x)
    layer = Layer.drawn(form, 40, 70, bias=False)
    y = check(form, layer, x, Call())
    exact = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).t()
    for i in (1, 3, 4, 5, 6):
        assert (y[i].double() - exact[i]).norm() < 0.02 * exact[i].norm(), i
    check(form, layer, x[:7], Call(GELU))
    ones = torch.ones(1, MOST_INPUTS + 1).to(form.x)
    most = torch.full((1, MOST_INPUTS + 1), 127, dtype=torch.int8)
    check(form, Layer(most[:, :-1], torch.ones(1), None), ones[:, :-1].contiguous(), Call())
    assert run(form, Layer(most, torch.ones(1), None), ones, None, Call()) is None


def check_not_finite(form: Form) -> None:
    """int8 declines NaN and infinity wherever they are; bf16 carries them to their row alone."""
    torch.manual_seed(4)
    layer = Layer.drawn(form, 33, 67)
    for value, row, column, threads, by_rows in itertools.product(
        (float("nan"), float("inf"), -float("inf")), (0, 20, 37), (0, 40, 66), (1, 2), (False, True)
    ):
        x = torch.randn(38, 67).to(form.x)
        x[row, column] = value
        y = run(form, layer, x, None, Call(RELU, threads, by_rows))
        if form.weight == torch.int8:
            assert y is None
        else:
            assert y is not None
            rows = torch.arange(38) != row
            assert torch.isfinite(y[rows]).all()
            hit = layer.weight[:, column].double() * value
            assert torch.equal(y[row].isnan(), hit.isnan()) and torch.equal(y[row].isinf(), hit == float("inf"))
