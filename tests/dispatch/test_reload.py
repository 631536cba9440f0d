"""``reload`` and ``rollback``: the next generation serves everything that there is, a bad one nothing."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import gc
import io
import json
import os
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dks.codegen import package as packaging
from dks.codegen.package import build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import native, pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.generation import Generation
from dks.dispatch.loader import import_package
from dks.dispatch.manifest import MANIFEST, file_digest, seal
from dks.dispatch.runtime import Runtime
from dks.dispatch.tiles import library
from tests.codegen.rows import problem, row
from tests.dispatch.swapping import (
    MARKS,
    K,
    N,
    add_kernel,
    add_marked,
    census,
    constants,
    form,
    mark_of,
    opened,
    runtime,
    table,
)

__all__ = ["form"]  # a fixture

ONE, TWO = MARKS


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    add_marked(monkeypatch)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """packages(name, winner, sizes) -> the folder of a real package whose prepared and direct linears it serves."""
    for name in ("compile_into", "compile_library"):  # seconds each, and tested where they belong
        monkeypatch.setattr(packaging, name, lambda *_: "not in this test")
    here = json.dumps(Environment.current().to_dict(), sort_keys=True)

    def make(name: str, winner: str, sizes: tuple[int, ...] = (1, 16, 256)) -> Path:
        rows: list[Measurement] = []
        for m in sizes:
            rows += [row("torch.linear", 100, problem(m)), row(winner, 50, problem(m))]
        rows = [dataclasses.replace(r, environment=here) for r in rows]
        return build(select(rows, Policy(max_error=1e-5)), rows, tmp_path, name).folder

    return make


def layer_of(owner: Any) -> Any:
    prepare = owner.prepare_linear if isinstance(owner, ModuleType) else owner.server("linear").prepare
    return prepare(*constants()).requires_grad_(False)


def served_by(layer: Any, rows: int = 16) -> str:
    x = torch.randn(rows, K)
    return mark_of(layer(x), x, layer.weight, layer.bias)


def called_by(function: Callable[..., torch.Tensor], rows: int = 16) -> str:
    x, (w, b) = torch.randn(rows, K), constants()
    return mark_of(function(x, w, b), x, w, b)


def test_what_serves_follows_everywhere(packages: Any, form: str, tmp_path: Path) -> None:
    one, two = packages("reload_one", ONE), packages("reload_two", TWO, (1, 16, 256, 1024))
    served = import_package(one)
    layer, model = layer_of(served), nn.Sequential(nn.Linear(K, N), nn.Tanh()).requires_grad_(False)
    served.optimize(model)
    asked: dict[str, int] = {"m": 16, "n": N, "k": K}
    hashes = {}

    def check(expected: str, missing: int) -> None:
        assert served_by(layer) == served_by(model[0]) == called_by(served.linear) == expected
        assert served_by(layer_of(served)) == expected, "a layer that is made now"
        assert served.explain("linear", **asked).candidate == served.explain("linear", m=9, n=N, k=K).candidate
        assert served.explain("linear", **asked).candidate == expected
        # A call of 600 rows lies past all that the first package measured; the second knows it.
        assert served.export_misses(tmp_path / "misses.yaml") == missing
        assert hashes.setdefault(expected, served.stats()["generation"]) == served.stats()["generation"]
        assert served.table_hash() == served.stats()["generation"]

    layer(torch.randn(600, K))
    check(ONE, 1)
    said = served.reload(two)
    assert str(two) in said and "layers bound" in said
    check(TWO, 0)
    for expected, missing in ((ONE, 1), (TWO, 0), (ONE, 1)):
        assert "serves again" in served.rollback()
        check(expected, missing)
    assert len(set(hashes.values())) == 2
    served.reload(str(two))
    served.reload(one)
    check(ONE, 1)
    served.rollback()
    check(TWO, 0)
    assert all(answers.startswith(form) for answers in served.stats()["lookup"].values())


def test_without_a_reload_there_is_nothing_to_go_back_to(packages: Any) -> None:
    served = import_package(packages("reload_first", ONE))
    with pytest.raises(RuntimeError, match="nothing was reloaded"):
        served.rollback()
    assert called_by(served.linear) == ONE
    with pytest.raises(RuntimeError, match="made by hand, there is nothing to load with"):
        Runtime("t", Generation(table(ONE))).reload("anywhere")


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("going back touched the disk, a library or another program")


def test_going_back_takes_no_disk_and_no_compiler(
    packages: Any, form: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    one, two = packages("reload_old", ONE), packages("reload_new", TWO)
    served = import_package(one)
    layers = [layer_of(served) for _ in range(50)]
    served.reload(two)
    shutil.rmtree(one)
    shutil.rmtree(two)
    monkeypatch.setenv("CXX", "/nonexistent")
    x, (w, b) = torch.randn(16, K), constants()
    took = []
    with monkeypatch.context() as poisoned:
        for owner, name in (
            *((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "scandir"), (os, "listdir")),
            *((subprocess, "Popen"), (library, "add"), (native, "install")),
        ):
            poisoned.setattr(owner, name, forbidden)
        answers = []
        for _ in range(9):
            start = time.perf_counter()
            served.rollback()
            took.append(time.perf_counter() - start)
            answers.append([*(layer(x) for layer in layers), served.linear(x, w, b)])
            told = served.explain("linear", m=16, n=N, k=K)
    for i, found in enumerate(answers):
        expected = (ONE, TWO)[i % 2]
        assert {mark_of(y, x, layer.weight, layer.bias) for y, layer in zip(found, layers)} == {expected}  # noqa: B905
        assert mark_of(found[-1], x, w, b) == expected
    assert told.candidate == ONE and told.rule is not None, "the evidence is in memory too"
    worst = f"rollback of 50 layers, {form}: slowest of {len(took)} {max(took) * 1e6:.0f} us"
    record_property("rollback", worst)
    print(worst)


def changed(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\n")


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(seal(data))


def not_a_table(folder: Path) -> None:
    (folder / "_table.py").write_text("raise SystemExit('it ran')\n")
    digest = file_digest(folder / "_table.py")
    resealed(folder, lambda data: data["files"].update({"_table.py": digest}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "No such file"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "Not a directory"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir() if path.is_file()], "manifest"),
    "a damaged table": (lambda folder: changed(folder, "_table.py"), "_table.py: changed since it was built"),
    "damaged evidence": (lambda folder: changed(folder, "lut.json"), "lut.json: changed"),
    "a damaged manifest": (lambda folder: changed(folder, MANIFEST), "differs from its digest"),
    "a file too many": (lambda folder: (folder / "torch.py").write_text("x"), "not a file of this package"),
    "a file too few": (lambda folder: (folder / "table.hpp").unlink(), "table.hpp: missing"),
    "another machine": (
        lambda folder: resealed(folder, lambda data: data["environment"].update(arch="Other 1 2 3")),
        "arch: Other 1 2 3 != ",
    ),
    "other threads": (
        lambda folder: resealed(folder, lambda data: data["environment"].update(threads="4096")),
        "threads: 4096 != ",
    ),
    "not a table": (not_a_table, "found no table"),
    "open to others": (lambda folder: folder.chmod(0o777), "others may write"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_package_never_serves(packages: Any, case: str) -> None:
    spoil, said = BAD[case]
    served = import_package(packages("reload_good", ONE))
    layer, bad = layer_of(served), packages("reload_bad", TWO)
    spoil(bad)
    before = served.stats()
    with pytest.raises(BadInput, match=said):
        served.reload(bad)
    assert served.stats() == before
    assert served_by(layer) == called_by(served.linear) == ONE
    with pytest.raises(RuntimeError, match="nothing was reloaded"):
        served.rollback()
    served.reload(packages("reload_better", TWO))
    with pytest.raises(BadInput):
        served.reload(bad)
    assert served_by(layer) == called_by(served.linear) == TWO
    served.rollback()
    assert served_by(layer) == called_by(served.linear) == ONE


def test_strict_refuses_what_is_not_proved(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = import_package(packages("reload_strict", ONE))
    kernel = pool.kernels()[TWO]
    monkeypatch.setitem(pool.kernels(), TWO, dataclasses.replace(kernel, searches="it tunes itself"))
    two = packages("reload_searching", TWO)
    monkeypatch.setenv("DKS_STRICT", "1")
    with pytest.raises(BadInput, match="it tunes itself"):
        served.reload(two)
    assert called_by(served.linear) == ONE


def test_entries_that_may_not_run_here_are_named(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the import: the rest of the table serves."""
    served = import_package(packages("reload_whole", ONE))
    two = packages("reload_part", TWO)
    monkeypatch.delitem(pool.kernels(), TWO)
    with pytest.warns(RuntimeWarning, match=r"entries of test\.two are switched off: this version has no such"):
        served.reload(two)
    assert called_by(served.linear) == "framework"
    served.rollback()
    assert called_by(served.linear) == ONE


def test_a_layer_that_is_made_between_serves_both(form: str) -> None:
    served = runtime(ONE)
    served.reload(TWO)
    layer = layer_of(served)
    twin = copy.deepcopy(layer)
    assert served_by(twin) == "framework", "a copy is plain until it is optimized"
    served.optimize(twin)
    for expected in (TWO, ONE, TWO):
        assert served_by(layer) == served_by(twin) == expected
        served.rollback()


def test_a_changed_weight_is_bound_to_both(form: str) -> None:
    served = runtime(ONE)
    layer = layer_of(served)
    served.reload(TWO)
    layer.load_state_dict({"weight": torch.randn(N, K), "bias": torch.randn(N)})
    assert served_by(layer) == TWO
    served.rollback()
    assert served_by(layer) == ONE
    layer.weight.mul_(2)
    served.reload(TWO)
    assert served_by(layer) == "framework" and layer.stale
    layer.refresh()
    assert served_by(layer) == TWO


def test_a_stale_layer_of_any_shape_stops_no_reload(form: str) -> None:
    served = runtime(ONE)
    layers = [layer_of(served) for _ in range(4)]
    layers[0].weight.data = torch.randn(5)
    layers[1].weight.data = torch.randn(N, K).bfloat16()
    del layers[2].weight
    served.reload(TWO)
    assert served_by(layers[3]) == TWO and served.stats()["failed"] == {}
    x = torch.randn(8, K).bfloat16()
    layers[1].bias.data = layers[1].bias.data.bfloat16()
    assert torch.equal(layers[1](x), F.linear(x, layers[1].weight, layers[1].bias))


def test_parameters_that_are_lent_during_a_reload_are_not_bound(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``functional_call`` gives a layer other parameters for a while; another thread may reload meanwhile."""
    served = runtime(ONE)
    layer = layer_of(served)
    other = {"weight": torch.randn(2 * N, K), "bias": torch.randn(2 * N)}

    def reloads(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        served.reload(TWO)
        return F.linear(x, module.weight, module.bias)

    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "framework", reloads)
        x = torch.randn(8, K)
        assert torch.equal(functional_call(layer, other, (x,)), F.linear(x, *other.values()))
    assert served_by(layer) == TWO
    served.rollback()
    assert served_by(layer) == ONE


def test_an_interrupted_reload_changes_and_keeps_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = runtime(ONE)
    layers = [layer_of(served) for _ in range(3)]
    bound = []

    def interrupted(w: torch.Tensor, b: torch.Tensor) -> Any:
        bound.append(1)
        if len(bound) == 2:
            raise KeyboardInterrupt
        return lambda x: x

    add_kernel(monkeypatch, "test.slow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        served.reload("test.slow")
    assert {served_by(layer) for layer in layers} == {ONE}
    assert all(set(layer._bindings) == {served.generation.serial} for layer in layers)
    with pytest.raises(RuntimeError, match="nothing was reloaded"):
        served.rollback()


def test_old_generations_go_with_all_that_was_bound_to_them(form: str) -> None:
    served = runtime(ONE)
    layers = [layer_of(served) for _ in range(3)]
    generations = [weakref.ref(served.generation)]
    counted = []
    for i in range(8):
        served.reload((ONE, TWO)[i % 2])
        generations.append(weakref.ref(served.generation))
        for layer in layers:
            served_by(layer)
        called_by(served.server("linear").call)
        assert all(len(layer._bindings) == 2 for layer in layers)
        if i in (1, 7):
            counted.append(census())
    assert [found() is None for found in generations] == [True] * 7 + [False] * 2
    assert counted[0] == counted[1], "two generations hold as much as any two"


def test_a_library_of_the_same_digest_is_loaded_once(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = ("tile.f32_avx512", "tile.f32_avx2")
    kernel = next((pool.kernels()[id] for id in generated if pool.kernels()[id].unavailable() is None), None)
    if kernel is None:
        pytest.skip("no generated linear runs on this machine")
    winner = next(c.id for c in kernel.candidates() if dict(c.params)["t"] == 1)
    monkeypatch.setattr(library, "_shipped", {})
    one, two = packages("reload_tiles", winner), packages("reload_more", winner, (1, 16, 256, 512))
    monkeypatch.setattr(library, "_locate", library._nowhere)
    served = import_package(one)
    layer, x = layer_of(served), torch.randn(16, K)
    for folder in (two, one, two, one):
        served.reload(folder)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4)
    assert len(library._shipped) == 1
    assert served.stats()["ops"]["linear"]["hits"] == {"exact": 4}


def test_a_call_that_two_reloads_overtake_is_served(form: str) -> None:
    """They come after the call asked which generation serves, and before it asked what is bound to that."""

    class Overtaken(Runtime):
        armed = False

        @property
        def generation(self) -> Generation:
            found = self.__dict__["generation"]
            if self.armed:
                self.armed = False
                self.reload(TWO)
                self.reload(TWO)
            return found  # type: ignore[no-any-return]

        @generation.setter
        def generation(self, generation: Generation) -> None:
            self.__dict__["generation"] = generation

    served = Overtaken("t", Generation(table(ONE), hash=ONE), opened)
    layer = layer_of(served)
    served.armed = True
    x = torch.randn(16, K)
    assert mark_of(layer.forward(x), x, layer.weight, layer.bias) == TWO
    assert served.stats()["ops"]["linear"]["fallbacks"] == {}


def work(jobs: list[Callable[[], object]], until: Callable[[], object]) -> None:
    """Run each job again and again in a thread of its own while ``until`` runs in this one."""
    over, faults = threading.Event(), list[BaseException]()

    def repeat(job: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                job()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        until()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if faults:
        raise faults[0]


def test_reloads_at_once_leave_one_that_serves_and_one_to_go_back_to(form: str) -> None:
    served = runtime(ONE)
    layers = [layer_of(served) for _ in range(3)]
    served.reload(TWO)
    work([lambda: served.reload(ONE), lambda: served.reload(TWO), served.rollback], lambda: time.sleep(0.4))
    assert len(served.held) == 2 and len({generation.serial for generation in served.held}) == 2
    for _ in range(2):
        expected = served.generation.hash
        assert {served_by(layer) for layer in layers} == {called_by(served.server("linear").call)} == {expected}
        assert all(set(layer._bindings) == {g.serial for g in served.held} for layer in layers)
        served.rollback()


def test_layers_come_change_and_go_during_reloads(form: str) -> None:
    served = runtime(ONE)
    fixed = [layer_of(served) for _ in range(4)]
    kept: list[Any] = []

    def make() -> None:
        kept.append(layer_of(served))
        assert served_by(kept[-1]) in MARKS
        del kept[:-8]

    def change() -> None:
        fixed[0].load_state_dict({"weight": torch.randn(N, K), "bias": torch.randn(N)})
        assert served_by(fixed[0]) in MARKS

    def copies() -> None:
        twin = copy.deepcopy(fixed[1])
        served.optimize(twin)
        assert served_by(twin) in MARKS
        served.restore(twin)
        assert served_by(twin) == "framework"

    def moves() -> None:
        fixed[2].to(torch.bfloat16).to(torch.float32)
        assert served_by(fixed[2]) in MARKS

    def swaps() -> None:
        model = nn.Sequential(nn.Linear(K, N), nn.Tanh()).requires_grad_(False)
        served.optimize(model)
        assert served_by(model[0]) in MARKS

    def reloads() -> None:
        for i in range(20):
            served.reload((ONE, TWO)[i % 2])
            served.rollback()

    work([make, change, copies, moves, swaps, lambda: gc.collect(1)], reloads)
    gc.collect()
    living = [*fixed, *kept]
    assert set(served.layers) == set(living)
    for _ in range(2):
        assert {served_by(layer) for layer in living} == {served.generation.hash}
        served.rollback()
    assert all(set(layer._bindings) == {g.serial for g in served.held} for layer in living)
