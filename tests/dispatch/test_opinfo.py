"""PyTorch's own samples of the operators, every dtype that it lists for CPUs, through the dispatcher: in every
state of a thread and for every kind of tensor the answer is the framework's, or its error.

The tables here send all they can to other kernels than the framework's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Table

pytest.importorskip("expecttest", reason="torch's samples need it")

NAMES = {
    "linear": "nn.functional.linear",
    "layer_norm": "nn.functional.layer_norm",
    "rms_norm": "nn.functional.rms_norm",
    "attention": "nn.functional.scaled_dot_product_attention",
    "softmax": "softmax",
    "cross_entropy": "nn.functional.cross_entropy",
}


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100, reduction: str = "none"
) -> torch.Tensor:
    """The framework's, with the arguments that ours has."""
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


FRAMEWORK = {  # without what the samples wrap around them: seeds
    "linear": F.linear,
    "layer_norm": F.layer_norm,
    "rms_norm": F.rms_norm,
    "attention": F.scaled_dot_product_attention,
    "softmax": torch.softmax,
    "cross_entropy": cross_entropy,
}
KERNELS = {
    "linear": ("mkldnn.linear_packed", "torch.addmm", "torch.linear_inplace", "torch.linear"),
    "layer_norm": ("torch.layer_norm_wide_affine", "torch.native_layer_norm"),
    "rms_norm": ("torch.rms_vector_norm",),
    "attention": ("torch.matmul_attention", "torch.sdpa"),
    "softmax": ("torch.softmax",),
    "cross_entropy": ("torch.cross_entropy",),
}
Sample = tuple[tuple[Any, ...], dict[str, Any]]
seed = torch.default_generator.manual_seed  # torch's own formats a traceback for each kind of device


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The samples are tiny: other threads would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def infos() -> dict[str, list[Any]]:
    """What PyTorch's tests know of each operator, all variants."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op: [info for info in op_db if info.name == name] for op, name in NAMES.items()}


_DRAWN: dict[object, list[Sample]] = {}  # drawing takes longer than all calls


def samples(info: Any, dtype: torch.dtype, grad: bool) -> list[Sample]:
    key = (info.name, info.variant_test_name, dtype, grad)
    if key in _DRAWN:
        return _DRAWN[key]
    torch.manual_seed(0)
    drawn = info.sample_inputs("cpu", dtype, requires_grad=grad)
    found = [((s.input, *s.args), dict(s.kwargs)) for s in drawn]
    if info.name == NAMES["cross_entropy"]:  # ours weighs no classes and smooths no labels
        found = [(a, {"reduction": "mean"} | o) for a, o in found if not {"weight", "label_smoothing"} & {*o}]
    if info.name == NAMES["attention"] and dtype.itemsize == 2:
        # Scores of hundreds, rounded to 16 bits, differ by more than softmax forgives: numbers of unit size do.
        found = [each_tensor(lambda t: t / 8 if t.is_floating_point() else t, sample) for sample in found]
    _DRAWN[key] = found
    return found


def statics(op: str, drawn: list[Sample]) -> list[dict[str, int]]:
    """Shapes of the weights, widths or heads in the samples: what a table must hold to serve them."""
    found = []
    for args, _ in drawn:
        if op == "linear" and args[1].dim() == 2:
            n, k = args[1].shape
            found.append({"n": n, "k": k})
        elif op.endswith("_norm") and len(args[1]) == 1:
            found.append({"n": args[1][0]})
        elif op == "attention" and args[0].dim() == args[1].dim() == 4:
            found.append({"h": args[0].shape[1], "hkv": args[1].shape[1], "d": args[0].shape[3]})
        elif op == "softmax":
            found.append({})
        elif op == "cross_entropy" and args[0].dim() == 2:
            found.append({"n": args[0].shape[1]})
    return [dict(shape) for shape in {tuple(shape.items()) for shape in found if 0 not in shape.values()}]


def routed(route: Any, op: str, infos: list[Any]) -> Runtime:
    drawn = [s for info in infos for s in samples(info, torch.float32, False)]
    made = route(op, KERNELS[op], statics(op, drawn)).generation.table
    wide = [
        Group(g.op, g.form, g.traits, g.statics, tuple((*e[:-1], 4096) for e in g.edges), g.cells)
        for g in made.groups
    ]
    return Runtime(f"opinfo_{op}", Generation(Table(made.rules, tuple(wide))))


def each_tensor(change: Callable[[torch.Tensor], torch.Tensor], sample: Sample) -> Sample:
    """The sample with every tensor changed; those that require gradients do so as before."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return change(value.detach()).requires_grad_(value.requires_grad)

    return tuple(one(a) for a in sample[0]), {name: one(a) for name, a in sample[1].items()}


def noncontiguous(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second element of memory."""
    return torch.stack((t, t), dim=-1)[..., 0]


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first of the leading dim over and over, with a stride of zero."""
    return t[:1].expand(t.shape) if t.dim() and len(t) and t.is_floating_point() else t


def offset(t: torch.Tensor) -> torch.Tensor:
    """At an address that only the element's size divides."""
    return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)


class Sub(torch.Tensor):
    """A subclass that means nothing."""


@dataclass(frozen=True)
class Way:
    """How a sample is called: what is done to its tensors, and in which state."""

    change: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    state: Callable[[], Any] = contextlib.nullcontext
    grads: tuple[bool, ...] = field(default=(False,))


WAYS = {
    "as they are": Way(grads=(False, True)),
    "not recorded": Way(state=torch.no_grad, grads=(True,)),
    "inference": Way(state=torch.inference_mode, grads=(False, True)),
    "autocast": Way(state=lambda: torch.autocast("cpu", dtype=torch.bfloat16), grads=(False, True)),
    "noncontiguous": Way(noncontiguous, grads=(False, True)),
    "expanded": Way(expanded),
    "offset": Way(offset),
    "subclass": Way(lambda t: t.clone().as_subclass(Sub)),  # type: ignore[arg-type,return-value]
    "meta": Way(lambda t: t.to("meta")),
}


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-5, torch.complex64: 2e-5}.get(dtype, 1e-9)


def outcome(call: Callable[..., Any], sample: Sample, grads: Callable[[], list[torch.Tensor]]) -> Any:
    """What a call returns and the gradients of its sum, or the type of the error it raises."""
    seed(0)  # for dropout
    try:
        y = call(*sample[0], **sample[1])
        if not y.requires_grad:
            return y, []
        seed(0)
        weights = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        return y, list(torch.autograd.grad(y, grads(), weights, allow_unused=True))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return type(error)


def same(found: Any, wanted: Any) -> str | None:
    """What differs between two outcomes, or None."""
    if isinstance(wanted, type) or isinstance(found, type):
        return None if found is wanted else f"{found} for {wanted}"
    for f, w in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        if f is None or w is None:
            if f is not w:
                return f"gradient {f} for {w}"
            continue
        if type(f) is not type(w):
            return f"{type(f)} for {type(w)}"
        for name in ("dtype", "device", "shape", "requires_grad"):
            if getattr(f, name) != getattr(w, name):
                return f"{name} {getattr(f, name)} for {getattr(w, name)}"
        if f.is_inference() != w.is_inference():
            return "an inference tensor or not"
        scale = tolerance(w.dtype)
        if not f.is_meta and not torch.allclose(f, w, rtol=scale, atol=scale, equal_nan=True):
            return f"{(f - w).abs().max()} off"
    return None


def leaves(sample: Sample) -> list[torch.Tensor]:
    given = (*sample[0], *sample[1].values())
    return [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]


def cases(infos: list[Any]) -> Iterator[tuple[str, Way, Sample]]:
    for info in infos:
        for dtype in sorted(info.supported_dtypes("cpu"), key=str):
            for name, way in WAYS.items():
                for grad in way.grads:
                    if grad and not (info.supports_autograd and (dtype.is_floating_point or dtype.is_complex)):
                        continue
                    for i, sample in enumerate(samples(info, dtype, grad)):
                        yield f"{info.variant_test_name} {dtype} {name} grad={grad} #{i}", way, sample


def prepared(op: str, server: Any, sample: Sample) -> tuple[Any, Sample, Callable[..., Any]] | None:
    """A layer of the sample's constants, what remains to be given, the framework's call; None without a layer."""
    args, options = sample
    if op == "linear":
        x, weight, bias = (*args, None)[:3]
        if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
            return None
        layer = server.prepare(weight, bias)
        return layer, ((x,), {}), lambda x: F.linear(x, layer.weight, layer.bias)
    constants = args[2:]
    if len(args[1]) != 1 or not constants or any(t is None for t in constants):
        return None
    if op == "rms_norm":
        layer = server.prepare(constants[0], options.get("eps"))
        return layer, ((args[0],), {}), lambda x: F.rms_norm(x, args[1], layer.weight, options.get("eps"))
    if len(constants) != 2:
        return None
    layer = server.prepare(*constants, **options)
    return layer, ((args[0],), {}), lambda x: F.layer_norm(x, args[1], layer.weight, layer.bias, **options)


def served(runtime: Runtime) -> int:
    return sum(sum(found["hits"].values()) for found in runtime.stats()["ops"].values())


def finish(what: str, runtime: Runtime, total: int, wrong: list[str]) -> None:
    print(
        f"{what}: {total - len(wrong)} of {total} calls as the framework's, {served(runtime)} served by the table"
    )
    assert not wrong, "\n".join(wrong[:20])
    assert total > 0 and served(runtime) > 0 and runtime.failures == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", NAMES)
def test_the_functional_form(infos: dict[str, list[Any]], route: Any, op: str) -> None:
    runtime = routed(route, op, infos[op])
    call, total, wrong = runtime.server(op).call, 0, []
    for name, way, drawn in cases(infos[op]):
        total += 1
        with way.state():
            sample = each_tensor(way.change, drawn)
            found, wanted = (outcome(f, sample, lambda s=sample: leaves(s)) for f in (call, FRAMEWORK[op]))
        if (reason := same(found, wanted)) is not None:
            wrong.append(f"{name}: {reason}")
    finish(op, runtime, total, wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", ["linear", "layer_norm", "rms_norm"])
def test_prepared_layers(infos: dict[str, list[Any]], route: Any, op: str) -> None:
    runtime = routed(route, op, infos[op])
    total, wrong = 0, []
    for name, way, drawn in cases(infos[op]):
        with way.state():
            parts = prepared(op, runtime.server(op), each_tensor(way.change, drawn))
            if parts is None:
                continue
            total += 1
            layer, sample, framework = parts

            def grads(sample: Sample = sample, layer: Any = layer) -> list[torch.Tensor]:
                return [*leaves(sample), *(p for p in layer.parameters() if p.requires_grad)]

            found, wanted = (outcome(f, sample, grads) for f in (layer, framework))
        if (reason := same(found, wanted)) is not None:
            wrong.append(f"{name}: {reason}")
    finish(f"prepared {op}", runtime, total, wrong)


def test_error_inputs(infos: dict[str, list[Any]], route: Any) -> None:
    total = 0
    for op, known in infos.items():
        call = routed(route, op, known).server(op).call
        for info in known:
            for wrong in info.error_inputs("cpu") if info.error_inputs_func else ():
                s = wrong.sample_input
                with pytest.raises(wrong.error_type, match=wrong.error_regex):
                    call(s.input, *s.args, **s.kwargs)
                total += 1
    assert total > 0


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


WRONG: dict[str, list[tuple[Any, ...]]] = {
    "linear": [(t(2, 3), t(4, 5)), (t(2, 3), t(4, 3), t(5)), (t(2, 3), t(3, 3, 3)), (t(3), None),
               (t(2, 3), t(4, 3, dtype=torch.bfloat16)), (t(), t(4, 3)), (None, t(4, 3)), ([1.0], t(1, 1))],
    "layer_norm": [(t(2, 3), (4,)), (t(2, 3), (3,), t(4)), (t(2, 3), (3,), t(3), t(2)), (t(2, 3), ()), (None, (3,)),
                   (t(2, 3, dtype=torch.int32), (3,)), (t(2, 3), (3,), t(3), None, "small"), (t(2, 3), 3)],
    "rms_norm": [(t(2, 3), (4,)), (t(2, 3), (3,), t(4)), (t(2, 3), ()), (t(2, 3), "three"), (None, (3,))],
    "softmax": [(t(2, 3), 2), (t(2, 3), -3), (t(2, 3, dtype=torch.int32), -1), (t(2, 3), "last"), (None, -1)],
    "cross_entropy": [(t(2, 3), t(3, dtype=torch.int64)), (t(2, 1), t(2, dtype=torch.int64)), (t(2, 3), None),
                      (t(2, 3), t(2, dtype=torch.int32)), (t(2, 3), t(2, dtype=torch.int64), 1.5), (None, t(2)),
                      (t(), t(dtype=torch.int64)), (t(2, 3, dtype=torch.int32), t(2, dtype=torch.int64))],
    "attention": [(t(1, 2, 3, 4), t(1, 2, 3, 5), t(1, 2, 3, 4)), (t(1, 2, 3, 4), t(1, 2, 5, 4), t(1, 2, 3, 4)),
                  (t(3), t(3), t(3)), (t(1, 2, 3, 4), None, t(1, 2, 3, 4)), (t(1, 4, 3, 8), *[t(1, 2, 3, 8)] * 2),
                  (*[t(1, 2, 3, 4)] * 3, t(1, 2, 3, 3), 0.0, True), (*[t(1, 2, 3, 4)] * 3, t(9, 9)),
                  (*[t(1, 2, 3, 4)] * 3, t(3, 3, dtype=torch.int32)), (*[t(1, 2, 3, 4, dtype=torch.int32)] * 3,)],
}  # fmt: skip


@pytest.mark.parametrize(("op", "i"), [(op, i) for op, calls in WRONG.items() for i in range(len(calls))])
def test_wrong_calls(infos: dict[str, list[Any]], route: Any, op: str, i: int) -> None:
    args = WRONG[op][i]
    call = route(op, KERNELS[op], statics(op, samples(infos[op][0], torch.float32, False))).server(op).call
    try:
        wanted = FRAMEWORK[op](*args)
    except Exception as error:  # whatever it is, it is the framework's word
        with pytest.raises(type(error)) as caught:
            call(*args)
        assert str(caught.value) == str(error)
    else:
        assert torch.equal(call(*args), wanted)
