"""How the extension asks PyTorch, in nanoseconds, whether a thread's operators are plain computations.

PyTorch keeps that in thread-local switches, read by functions without a stable interface. Each is looked up by its
symbol and proved here: it must say no, then yes while Python turns its switch on, then no again. One that is
missing or fails its proof is replaced by the Python function that asks the same, some 30 ns a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW, _WIDE, _CALLABLE, _LEVEL = range(4)
"""``Probe::Kind`` of ``thread.hpp``."""

Probe = tuple[int, int, int, object, object]
"""Kind, address, argument, object, key."""

Switch = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Question:
    """One switch.

    Attributes:
        library: of PyTorch, that holds the function.
        symbol: of the function, as its C++ compiler mangles it.
        wide: whether it returns an int64 rather than a bool.
        argument: its argument, or any number where it takes none.
        on: turns the switch on in this thread.
        python: asks the same from Python.
    """

    library: str
    symbol: str
    wide: bool
    argument: int
    on: Switch
    python: Callable[[], object]


class _Dispatching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that does nothing but be there."""


class _Overriding(TorchFunctionMode):
    """Likewise."""


@contextmanager
def _key_on(name: str) -> Iterator[None]:
    torch._C._dispatch_tls_set_dispatch_key_included(name, True)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(name, False)


@contextmanager
def _autocast_on(device: str) -> Iterator[None]:
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)  # torch.autocast does nothing for a GPU that is not there
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)


def _key(name: str) -> int:
    return int(torch._C._parse_dispatch_key(name))  # type: ignore[call-overload, no-any-return]


def _questions() -> list[Question]:
    included = "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE"
    functorch = "FuncTorchDynamicLayerFrontMode"
    return [
        Question(
            "libc10.so", "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", True, 0,
            _Dispatching, torch._C._len_torch_dispatch_stack,
        ),
        Question(
            "libtorch_cpu.so", "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv", True, 0,
            _Overriding, torch._C._len_torch_function_stack,
        ),
        Question(
            "libc10.so", included, False, _key(functorch),
            lambda: _key_on(functorch), lambda: torch._C._functorch.maybe_current_level() is not None,
        ),
        Question("libc10.so", included, False, _key("Tracer"), lambda: _key_on("Tracer"), torch._C._is_tracing),
    ]  # fmt: skip


def _autocasts() -> list[Question]:
    symbol = "_ZN2at8autocast19is_autocast_enabledEN3c1010DeviceTypeE"
    return [
        Question(
            "libtorch_cpu.so", symbol, False, number,
            partial(_autocast_on, device), partial(torch.is_autocast_enabled, device),
        )
        for device, number in (("cpu", 0), ("cuda", 1))  # c10::DeviceType
    ]  # fmt: skip


def _gradients() -> Question:
    return Question(
        "libc10.so", "_ZN3c108GradMode10is_enabledEv", False, 0, torch.enable_grad, torch.is_grad_enabled,
    )  # fmt: skip


def special() -> tuple[Probe, ...]:
    """Probes that each answer yes where the framework must serve."""
    level: Probe = (_LEVEL, 0, 0, forward_ad.__dict__, "_current_level")
    return (*(_probe(question) for question in _questions()), level)


def autocast() -> tuple[Probe, ...]:
    """The probes that answer whether autocast is on, for a CPU and for a GPU."""
    return tuple(_probe(question) for question in _autocasts())


def gradients() -> Probe:
    """The probe that answers whether autograd records."""
    return _probe(_gradients())


def unproved() -> list[str]:
    """Symbols of the switches that are asked through Python here."""
    return [q.symbol for q in (*_questions(), *_autocasts(), _gradients()) if _probe(q)[0] == _CALLABLE]


def _probe(question: Question) -> Probe:
    address = _proved(question)
    if address is None:
        return (_CALLABLE, 0, 0, question.python, None)
    return (_WIDE if question.wide else _NARROW, address, question.argument, None, None)


def _proved(question: Question) -> int | None:
    """The function's address if it answers as it should, else None."""
    library = Path(torch.__file__).parent / "lib" / question.library
    try:
        function = ctypes.CDLL(str(library))[question.symbol]
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int64]
    function.restype = ctypes.c_int64 if question.wide else ctypes.c_bool
    try:
        with torch.no_grad():
            before = function(question.argument)
            with question.on():
                during = function(question.argument)
            after = function(question.argument)
    except Exception:  # what turns the switch is private too: without it there is no proof
        return None
    if before or not during or after:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
