"""``torch.compile`` and ``torch.export`` through the dispatcher: ``torch.ops.dks.*``.

A graph holds the operator and the name of the table that is to serve it, and asks that table each time it runs.
In a process where no package of that name was imported the framework's own operator serves, with a warning.
An exported program holds it as well, until ``run_decompositions`` leaves PyTorch's own operators alone.
How to add operators: https://docs.pytorch.org/docs/stable/library.html
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from dks.dispatch.ambient import is_compiling, is_differentiating, transform_objection, wants_gradient

if TYPE_CHECKING:
    from dks.dispatch.prepared import PreparedModule
    from dks.dispatch.runtime import Runtime

NAMESPACE = "dks"
OVERLOAD = "import_dks_dispatch_graphs"
"""Name of every operator's only overload. Whoever loads an exported program without DKS gets an error of PyTorch's
that says nothing else of ours than this name: it is what to import."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")

# PyTorch notes the file that asks, and takes only names in UTF-8: a module's is one, its path need not be.
_library: Any = eval(compile("torch.library.Library(NAMESPACE, 'DEF')", __name__, "eval"))
_runtimes: WeakValueDictionary[str, Runtime] = WeakValueDictionary()
_layers: WeakValueDictionary[Hashable, PreparedModule] = WeakValueDictionary()
_keys: WeakKeyDictionary[PreparedModule, Hashable] = WeakKeyDictionary()
_missing: set[str] = set()
_Tensor, _Parameter, _strided = torch.Tensor, torch.nn.Parameter, torch.strided


def enroll(runtime: Runtime) -> None:
    """Let graphs find ``runtime`` under its name; the newest of a name serves."""
    _runtimes[runtime.name] = runtime


def remember(layer: PreparedModule, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Let graphs find ``layer``, which binds these parameters and no longer those that it bound before. Graphs hold
    its parameters, not the layer."""
    before = _keys.get(layer)
    if before is not None and _layers.get(before) is layer:
        del _layers[before]
    key = _layer_key(layer.server.runtime.name, layer.server.op, weight, bias, layer.setting)
    _keys[layer], _layers[key] = key, layer


def _layer_key(
    table: str, op: str, weight: torch.Tensor, bias: torch.Tensor | None, setting: object
) -> tuple[object, ...]:
    return (table, op, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), setting)


def layer_for(
    table: str, op: str, weight: torch.Tensor, bias: torch.Tensor | None, setting: object
) -> PreparedModule | None:
    """The living layer whose parameters are these very ones, or None.

    Args:
        setting: what else the layer was made with: the epilogue of a linear, the epsilon of a norm.
    """
    layer = _layers.get(_layer_key(table, op, weight, bias, setting))
    if layer is None or not getattr(layer, "bound", False):  # a restored one is as plain as any
        return None
    held = layer._parameters.get("weight"), layer._parameters.get("bias")
    # It may have been given other parameters since; what it watches itself is what they hold.
    return layer if all(_same_memory(*pair) for pair in zip(held, (weight, bias), strict=True)) else None


def _same_memory(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()


def wanted(reason: str) -> bool:
    """Whether a call that a server left to the framework for this reason belongs in a graph as the operator."""
    # Export that does not read the code runs it on fake tensors, which are a subclass.
    return reason == "compiling" or (reason == "subclass" and torch.compiler.is_exporting())


def takes(x: Any, *others: Any) -> bool:
    """Whether a traced call on these (tensors or None) is plain: on one CPU or GPU, of one dtype that tables hold,
    and neither autograd nor autocast is to see it. What is not is traced as the framework's own operator.

    ``torch.compile`` reads this code: every answer is guarded, so a graph runs where it holds.
    """
    if not isinstance(x, _Tensor) or x.dtype not in DTYPES or x.device.type not in DEVICES:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    grad = torch.is_grad_enabled()
    for t in (x, *others):
        if t is None:
            continue
        if not _is_plain(t, x.device) or t.dtype != x.dtype or (grad and t.requires_grad):
            return False
    return True


def lie_beside(x: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """``takes`` for tensors of whatever dtype that autograd never follows, masks and indices, beside ``x``."""
    return all(t is None or _is_plain(t, x.device) for t in tensors)


def _is_plain(t: Any, device: torch.device) -> bool:
    if type(t) is not _Tensor and type(t) is not _Parameter and (is_compiling() or not _is_fake(t)):
        return False
    return t.device == device and t.layout is _strided and not t.is_nested


def _is_fake(t: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor  # loaded already wherever there is one

    return isinstance(t, FakeTensor)


def contiguous(y: Any) -> Any:
    """An output, each tensor of it copied if it is not contiguous."""
    return tuple(t.contiguous() for t in y) if isinstance(y, tuple) else y.contiguous()


def define(
    op: str,
    schema: str,
    framework: Callable[..., Any],
    serve: Callable[..., Any],
    fake: Callable[..., Any],
    tidy: Callable[[Any], Any] = contiguous,
) -> Any:
    """Define ``torch.ops.dks.<name>``; returns it.

    Args:
        op: the operator whose server is asked.
        schema: ``name(arguments, str table) -> returns``; nothing is written to, nothing returned is an alias.
        framework: (arguments without the table) -> what the framework returns; differentiable.
        serve: (server, *arguments, table) -> the same through a table.
        fake: (arguments without the table) -> empty tensors of the output's shape, dtype and strides.
        tidy: an output -> the same in the strides that ``fake`` promises.
    """
    name, _, rest = schema.partition("(")
    full = f"{name}.{OVERLOAD}"

    def real(*args: Any) -> Any:
        runtime = _runtimes.get(args[-1])
        if runtime is None:
            _warn_missing(args[-1])
            return tidy(framework(*args[:-1]))
        return tidy(serve(runtime.server(op), *args))

    def with_autograd(*args: Any) -> Any:
        # Graphs are made where nothing records; an exported one may be run where something does.
        tensors = [t for t in args if isinstance(t, _Tensor)]
        if is_differentiating() or wants_gradient(*tensors):
            return framework(*args[:-1])
        if transform_objection() is None and all(type(t) is _Tensor or type(t) is _Parameter for t in tensors):
            return real(*args)  # below there is nothing else: saves a second way through torch's dispatcher
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def functionalized(mode: FunctionalTensorMode, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not _decomposes(mode):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return tidy(framework(*args[:-1]))

    _library.define(f"{full}({rest}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(full, real, "CompositeExplicitAutograd")
    _library.impl(full, with_autograd, "Autograd")
    _library.impl(full, lambda *args: framework(*args[:-1]), "FuncTorchBatched")
    qualified = f"{NAMESPACE}::{full}"
    torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]), lib=_library)
    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, functionalized, lib=_library)
    overload = getattr(getattr(getattr(torch.ops, NAMESPACE), name), OVERLOAD)
    return overload


def _decomposes(mode: FunctionalTensorMode) -> bool:
    """Whether it is ``run_decompositions`` of a program that traces; ``export`` itself traces before dispatch."""
    return torch.compiler.is_exporting() and not mode.pre_dispatch


def _warn_missing(table: str) -> None:
    if table not in _missing:
        _missing.add(table)
        warnings.warn(
            f"{table}: found no imported package of that name, expected the one that this graph was made with; the "
            f"framework's own operators serve until it is imported",
            RuntimeWarning,
            stacklevel=4,
        )
