"""Children of a fork while another thread of the parent holds our locks, or is half way through something."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dks.dispatch import forks, pool
from dks.dispatch.ops.linear import quantized_dynamic
from dks.dispatch.prepared import PreparedModule
from dks.dispatch.runtime import Runtime
from tests.dispatch.swapping import MARKS, K, N, add_marked, constants, form, mark_of, runtime

__all__ = ["form"]  # a fixture

ONE, TWO = MARKS
PATIENCE = 20  # seconds that a child may take; what hangs never ends

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    add_marked(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either, which is PyTorch's matter
    yield
    torch.set_num_threads(threads)


def in_child(work: Callable[[], object]) -> str:
    """How a forked child that does ``work`` ends."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        try:
            with torch.no_grad():
                work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "hangs" if os.WIFSIGNALED(status) else "ends" if status == 0 else "fails"


@contextmanager
def elsewhere(held: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Another thread is inside of ``held()`` until the block ends."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with held():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def layer_of(served: Runtime) -> Any:
    return served.server("linear").prepare(*constants()).requires_grad_(False)


def served_by(layer: Any) -> str:
    x = torch.randn(16, K)
    return mark_of(layer(x), x, layer.weight, layer.bias)


def all_that_a_worker_does(served: Runtime, layer: Any, expected: str = ONE) -> None:
    assert served_by(layer) == expected
    assert served_by(copy.deepcopy(layer)) == "framework", "a copy is the plain layer"
    assert served_by(layer_of(served)) == expected
    layer.load_state_dict({"weight": torch.ones(N, K), "bias": torch.ones(N)})
    assert served_by(layer) == expected
    model = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    assert served.optimize(model).swapped == 1 and served_by(model[0]) == expected
    other = TWO if expected == ONE else ONE
    served.reload(other)
    assert served_by(layer) == served_by(model[0]) == other
    served.rollback()
    assert served_by(layer) == expected
    served.server("linear").call(torch.randn(4, K + 1), torch.randn(N, K + 1))  # no table knows it: a new miss
    assert [miss.reason for miss in served.misses.snapshot()] == ["unknown_shape"]
    served.note_switched_off(next(iter(pool.candidates_for("linear", "cpu"))))
    assert len(served.stats()["switched_off"]) == 1


def test_while_another_thread_reloads(form: str) -> None:
    served = runtime(ONE)
    layers, stop = [layer_of(served) for _ in range(100)], threading.Event()

    def reloading() -> None:
        while not stop.is_set():
            served.reload(ONE)

    thread = threading.Thread(target=reloading)
    thread.start()
    try:
        for i in range(4):
            time.sleep(0.01 + 0.007 * i)
            assert in_child(lambda: all_that_a_worker_does(served, layers[0])) == "ends"
    finally:
        stop.set()
        thread.join()


LOCKS: dict[str, Callable[[Runtime], Callable[[], AbstractContextManager[object]]]] = {
    "none": lambda _: nullcontext,
    "what serves": lambda served: lambda: served.lock,
    "counting": lambda served: lambda: served._counting,
    "misses": lambda served: lambda: served.misses._lock,
    "torch's engine": lambda _: lambda: quantized_dynamic._ENGINE.chosen(torch.backends.quantized.engine),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_while_another_thread_holds(lock: str, form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    with elsewhere(LOCKS[lock](served)):
        assert in_child(lambda: all_that_a_worker_does(served, layer)) == "ends"
    assert served_by(layer) == ONE


def test_the_lock_of_the_forking_thread_itself(form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    with served.lock:
        assert in_child(lambda: all_that_a_worker_does(served, layer)) == "ends"


def test_torchs_engine_is_what_it_was(route: Any) -> None:
    usual = torch.backends.quantized.engine
    supported = torch.backends.quantized.supported_engines
    other = next(name for name in ("fbgemm", "onednn", "x86") if name in supported and name != usual)

    def pack() -> None:
        assert torch.backends.quantized.engine == usual
        kernel = f"quantized.dynamic_{other}"
        served = route("linear", (kernel,), [{"n": N, "k": K}])
        weight, bias = constants()
        y = served.server("linear").prepare(weight, bias)(torch.randn(4, K))
        assert y.shape == (4, N) and served.stats()["ops"]["linear"]["hits"]
        assert torch.backends.quantized.engine == usual

    with elsewhere(lambda: quantized_dynamic._ENGINE.chosen(other)):
        assert torch.backends.quantized.engine == other
        assert in_child(pack) == "ends"
    assert torch.backends.quantized.engine == usual and in_child(pack) == "ends"


def test_children_of_multiprocessing(form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    with elsewhere(lambda: served.lock):
        child = multiprocessing.get_context("fork").Process(target=all_that_a_worker_does, args=(served, layer))
        child.start()
        child.join(PATIENCE)
        ended = child.exitcode
        if ended is None:
            child.kill()
    assert ended == 0


def test_a_child_of_a_child(form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)

    def again() -> None:
        with elsewhere(lambda: served.lock):
            assert in_child(lambda: all_that_a_worker_does(served, layer)) == "ends"

    with elsewhere(lambda: served.lock):
        assert in_child(again) == "ends"


def stopped_in(
    served: Runtime, monkeypatch: pytest.MonkeyPatch, name: str
) -> Callable[[], AbstractContextManager[object]]:
    """A reload that stands still where it calls this method of the runtime, until the block ends."""
    reached, leave = threading.Event(), threading.Event()
    real, first = getattr(served, name), [True]

    def waits(*given: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and first.pop():
            first.append(False)
            reached.set()
            leave.wait()
        return real(*given)

    @contextmanager
    def held() -> Iterator[None]:
        monkeypatch.setattr(served, name, waits)
        thread = threading.Thread(target=served.reload, args=(TWO,))
        thread.start()
        assert reached.wait(PATIENCE)
        try:
            yield
        finally:
            leave.set()
            thread.join()
            monkeypatch.setattr(served, name, real)

    return held


@pytest.mark.parametrize("where", ["_bind", "_serve"])
def test_a_reload_that_is_lost_never_happened(where: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    with stopped_in(served, monkeypatch, where)():

        def child() -> None:
            monkeypatch.undo()
            add_marked(monkeypatch)
            assert served.held == (served.generation,)
            with pytest.raises(RuntimeError, match="no generation to go back to"):
                served.rollback()
            assert list(layer._bindings) == [served.generation.serial], "what never serves is not kept"
            all_that_a_worker_does(served, layer)

        assert in_child(child) == "ends"
    assert served_by(layer) == TWO, "the parent's goes on"


def test_both_forms_serve_one_generation_where_the_swap_was_cut_in_two(form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    served.reload(TWO)
    before, now = served._previous, served.generation
    assert before is not None
    served._previous, served.generation = now, before  # rollback's first store; the fast path's is missing

    def child() -> None:
        x = torch.randn(16, K)
        assert mark_of(layer.forward(x), x, layer.weight, layer.bias) == served_by(layer) == ONE
        all_that_a_worker_does(served, layer)

    assert in_child(child) == "ends"


@pytest.mark.parametrize("step", ["_held", "_statics", "_dtype", "_watch"])
def test_a_layer_that_a_lost_thread_was_binding_serves_no_old_weight(
    step: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    reached, leave = threading.Event(), threading.Event()
    real = PreparedModule.__setattr__

    def waits(module: PreparedModule, name: str, value: Any) -> None:
        if name == step and value is not None and threading.current_thread() is not threading.main_thread():
            reached.set()
            leave.wait()
        real(module, name, value)

    monkeypatch.setattr(PreparedModule, "__setattr__", waits)
    new = torch.randn(N, K)
    thread = threading.Thread(target=lambda: layer.load_state_dict({"weight": new, "bias": layer.bias.clone()}))
    thread.start()
    assert reached.wait(PATIENCE)

    def child() -> None:
        x = torch.randn(16, K)
        for reloaded in (False, True):
            if reloaded:
                served.reload(TWO)
            mark_of(layer(x), x, new, layer.bias)  # whoever serves, it is from the new one
        layer.refresh()
        assert served_by(layer) == TWO

    try:
        assert in_child(child) == "ends"
    finally:
        leave.set()
        thread.join()
    assert served_by(layer) == ONE


def test_whoever_is_gone_is_not_made_anew() -> None:
    served = runtime(ONE)
    gone = [weakref.ref(served), weakref.ref(served.misses)]
    assert {served, served.misses} <= set(forks._alive)
    del served
    gc.collect()
    assert [each() for each in gone] == [None, None]
