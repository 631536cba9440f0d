"""GPUs that are not there: tensors in a CPU's memory that say, to Python and to the compiled fast path, that they
are on one. PyTorch computes with them as ever: what is tested is who may serve a call, not what a GPU does with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dks.dispatch import native


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor up to what is changed here."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("index", ctypes.c_int32))


_View = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_Tensor))


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("header", ctypes.c_char * 16),
        ("makers", ctypes.c_void_p * 3),
        ("view", _View),
        ("stream", ctypes.c_void_p),
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.argtypes, _capsule.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
_inside = ctypes.pythonapi.PyCapsule_GetPointer
_inside.argtypes, _inside.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
_NAME = b"dlpack_exchange_api"


class Gpus:
    """All tensors are on cuda:0, but those that were put elsewhere."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.UntypedStorage, torch.device]] = {}

    def put(self, t: torch.Tensor, device: str) -> torch.Tensor:
        """``t``, on another device: so is whatever shares its memory."""
        storage = t.untyped_storage()
        self._held[storage.data_ptr()] = (storage, torch.device(device))
        return t

    def moved(self, module: torch.nn.Module, device: str) -> torch.nn.Module:
        """As ``module.to(device)``."""
        return module._apply(lambda t: self.put(t.detach().clone(), device))

    def device(self, t: torch.Tensor) -> torch.device:
        """Where ``t`` says that it is."""
        found = self._held.get(t.untyped_storage().data_ptr())
        return torch.device("cuda", 0) if found is None else found[1]


@contextmanager
def gpus() -> Iterator[Gpus]:
    """Pretend until the end of the block."""
    made = Gpus()
    saids = {
        "device": property(made.device),
        "is_cpu": property(lambda t: made.device(t).type == "cpu"),
        "is_cuda": property(lambda t: made.device(t).type == "cuda"),
        "get_device": lambda t: -1 if made.device(t).type == "cpu" else made.device(t).index,
    }
    module = native.module  # a test may hide it meanwhile
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    shown = (
        None
        if exchange is None
        else _Exchange.from_buffer_copy(ctypes.string_at(_inside(exchange, _NAME), ctypes.sizeof(_Exchange)))
    )
    try:
        for name, said in saids.items():
            setattr(torch.Tensor, name, said)
        if module is not None and shown is not None:
            real = _View(ctypes.cast(shown.view, ctypes.c_void_p).value or 0)

            def view(t: torch.Tensor, out: ctypes._Pointer[_Tensor]) -> int:
                try:
                    code = int(real(t, out))
                except Exception:  # what has no memory, such as a meta tensor
                    return -1
                out.contents.kind, out.contents.index = native.place(t)
                return code

            shown.view = _View(view)
            module.setup(native._given(_capsule(ctypes.addressof(shown), _NAME, None)))
        yield made
    finally:
        for name in saids:
            delattr(torch.Tensor, name)  # what they inherit answers again
        if module is not None and exchange is not None:
            module.setup(native._given(exchange))
