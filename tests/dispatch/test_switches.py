"""Settings of a process that change which code runs are part of what a measurement holds for, each by its name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dks.codegen import package as packaging
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import switches as module
from dks.dispatch.environment import MAX_TEXT, Environment
from dks.dispatch.switches import CPU, CUDA, ONEDNN, OPENMP, differences, openmp, switches
from tests.codegen.rows import row

PLAIN = {"cpu": switches("cpu", {}), "cuda": switches("cuda", {})}


def named(device: str, **variables: str) -> list[str]:
    """What differs from a process that has none of these."""
    return differences(switches(device, variables), PLAIN[device])


@pytest.mark.parametrize("name", [*CPU, *(f"{prefix}_{name}" for name in ONEDNN for prefix in ("ONEDNN", "DNNL"))])
def test_each_variable_of_a_cpus_libraries_is_named(name: str) -> None:
    shown = name.replace("DNNL_", "ONEDNN_").replace("ONEONEDNN", "ONEDNN")
    assert named("cpu", **{name: "avx2"}) == [f"{shown}: AVX2 != its default"]
    assert named("cpu", **{name: "  "}) == [] == named("cuda", **{name: "avx2"})


@pytest.mark.parametrize("name", CUDA)
def test_each_variable_of_a_gpus_libraries_is_named(name: str) -> None:
    assert named("cuda", **{name: ":4096:8"}) == [f"{name}: :4096:8 != its default"]
    assert named("cpu", **{name: ":4096:8"}) == []


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_PROC_BIND": "false", "OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "true", "MKL_CBWR": "off"},
        {"ONEDNN_MAX_CPU_ISA": "all", "ONEDNN_DEFAULT_FPMATH_MODE": "strict", "ONEDNN_CPU_ISA_HINTS": "no_hints"},
        {"DNNL_MAX_CPU_ISA": "DEFAULT", "PATH": "/bin", "OMP_NUM_THREADS": "2"},
        {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "SSE41"},  # the newer name counts
    ],
)
def test_what_says_the_default_in_words_is_no_difference(variables: dict[str, str]) -> None:
    assert named("cpu", **variables) == []


def test_other_values_of_one_switch_are_told_apart_and_equal_ones_are_not() -> None:
    one, other = switches("cpu", {"MKL_CBWR": "avx2"}), switches("cpu", {"MKL_CBWR": "COMPATIBLE"})
    assert differences(one, other) == ["MKL_CBWR: AVX2 != COMPATIBLE"]
    assert differences(one, switches("cpu", {"MKL_CBWR": "AVX2 "})) == []


def test_a_preloaded_library_counts_by_its_name_wherever_it_lies() -> None:
    one, other = ({"LD_PRELOAD": f"{place}/libjemalloc.so.2:/opt/libiomp5.so"} for place in ("/usr/lib", "/opt/my"))
    assert (
        named("cpu", **one) == ["LD_PRELOAD: LIBJEMALLOC.SO.2:LIBIOMP5.SO != its default"] == named("cpu", **other)
    )
    assert named("cpu", LD_PRELOAD="/opt/libiomp5.so /usr/lib/libjemalloc.so.2") != named("cpu", **one)


def test_openmps_part_is_told_variable_by_variable() -> None:
    found = {name: (value, words) for name, value, words in openmp("MKL_CBWR=AVX2 OMP_PLACES=CORES")}
    assert tuple(found) == OPENMP and found["OMP_PLACES"] == ("CORES", "  ")
    assert found["OMP_PROC_BIND"] == ("", "  0 FALSE NO OFF ")
    for text in ("", "unknown"):
        assert {value for _, value, _ in openmp(text)} == {text}


def set_float32(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def put(owner: Any, name: str, value: object) -> Callable[[], None]:
    def turn() -> None:
        with torch.backends.__allow_nonbracketed_mutation():  # PyTorch's own test helpers forbid it to the process
            setattr(owner, name, value)

    return turn


BACKENDS: Any = torch.backends
# What torch.use_deterministic_algorithms calls after it has imported the compiler, which takes seconds.
TURNED: list[tuple[str, str, Callable[[], None], Callable[[], None]]] = [
    (
        "cpu",
        "torch.backends.mkldnn.enabled: False",
        put(BACKENDS.mkldnn, "enabled", False),
        put(BACKENDS.mkldnn, "enabled", True),
    ),
    ("cpu", "torch.set_float32_matmul_precision: medium", set_float32("medium"), set_float32("highest")),
    (
        "cpu",
        "torch.use_deterministic_algorithms: on",
        lambda: torch._C._set_deterministic_algorithms(True, warn_only=False),
        lambda: torch._C._set_deterministic_algorithms(False, warn_only=False),
    ),
    (
        "cpu",
        "torch.use_deterministic_algorithms: warn",
        lambda: torch._C._set_deterministic_algorithms(True, warn_only=True),
        lambda: torch._C._set_deterministic_algorithms(False, warn_only=False),
    ),
    (
        "cpu",
        "torch.backends.cuda.enable_flash_sdp: False",
        lambda: BACKENDS.cuda.enable_flash_sdp(False),
        lambda: BACKENDS.cuda.enable_flash_sdp(True),
    ),
    (
        "cuda",
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
        put(BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        put(BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    ),
    (
        "cuda",
        "torch.backends.cudnn.deterministic: True",
        put(BACKENDS.cudnn, "deterministic", True),
        put(BACKENDS.cudnn, "deterministic", False),
    ),
]


@pytest.mark.parametrize(("device", "said", "turn", "back"), TURNED, ids=[said for _, said, *_ in TURNED])
def test_each_switch_of_pytorch_is_named(
    device: str, said: str, turn: Callable[[], None], back: Callable[[], None]
) -> None:
    turn()
    try:
        lines = named(device)
    finally:
        back()
    assert any(line.startswith(said) for line in lines), lines
    assert named(device) == []


def test_flushed_denormals_are_seen() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such switch")
    try:
        lines = named("cpu")
    finally:
        torch.set_flush_denormal(False)
    assert lines == ["torch.set_flush_denormal: True != its default"]


def test_the_kernels_that_pytorch_takes_from_python_are_part_of_a_gpus_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filters = SimpleNamespace(_op_symbols={"rms_norm"}, _dispatch_keys=set[str]())
    native = SimpleNamespace(
        available_dsls=["triton", "cutedsl"],
        triton=SimpleNamespace(enabled=True),
        cutedsl=SimpleNamespace(enabled=True),
        _get_filter_state=lambda: filters,
    )
    monkeypatch.setattr(module, "_BACKENDS", SimpleNamespace(python_native=native))
    assert module._python_native() == {
        "torch.backends.python_native": "cutedsl+triton",
        "torch.backends.python_native.disabled": "rms_norm",
    }
    native.cutedsl.enabled = False
    filters._op_symbols.clear()
    assert module._python_native() == {"torch.backends.python_native": "triton"}
    monkeypatch.setattr(module, "_BACKENDS", SimpleNamespace())  # before 2.13
    assert module._python_native() == {}


def test_switches_that_this_pytorch_lacks_or_has_newer_ones_for_are_left_out() -> None:
    def lacks() -> None:
        raise AttributeError

    def mixed() -> None:
        raise RuntimeError("mix of the legacy and new APIs")

    assert module._asked((("a", lacks, 1), ("b", mixed, 1), ("c", lambda: 2, 1))) == {"c": "2"}


@pytest.mark.parametrize(
    ("operator", "library", "all_", "effective"),
    [("none", "none", "none", "ieee"), ("bf16", "ieee", "none", "bf16"), ("none", "tf32", "ieee", "tf32"),
     ("none", "none", "tf32", "tf32"), ("ieee", "tf32", "tf32", "ieee")],
)  # fmt: skip
def test_precision_is_what_counts_in_the_end(
    operator: str, library: str, all_: str, effective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=operator), fp32_precision=library)
    monkeypatch.setattr(module, "_BACKENDS", SimpleNamespace(fp32_precision=all_))
    assert module._precision(backend) == effective


def test_whatever_a_variable_holds_is_one_printable_line() -> None:
    odd = dict.fromkeys(CPU, "\x1b[31m " + "x" * 300)
    text = switches("cpu", odd)
    assert text.isprintable() and len(text) < MAX_TEXT
    environment = dataclasses.replace(Environment.current(), switches=text)
    assert Environment.from_dict(environment.to_dict()) == environment
    assert text != switches("cpu", {**odd, "OMP_PLACES": "cores"}), "the last one is told too"


CODE = """
import json, sys, warnings
import torch
torch.backends.mkldnn.enabled = False
torch.use_deterministic_algorithms(True)
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pack_switched as package
x, w = torch.randn(4, 32), torch.randn(64, 32)
assert torch.equal(package.linear(x, w), torch.nn.functional.linear(x, w))
print(json.dumps([package.stats()["table"], [str(each.message) for each in caught]]))
"""


def test_a_table_is_refused_in_a_process_with_switches_and_each_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaging, "compile_into", lambda folder: "no C++ compiler")
    monkeypatch.setattr(packaging, "compile_library", lambda folder: "no C++ compiler")
    monkeypatch.delenv("MKL_CBWR", raising=False)
    here = json.dumps(Environment.current().to_dict(), sort_keys=True)
    rows = [row("torch.linear", 100, environment=here), row("torch.addmm", 50, environment=here)]
    packaging.build(select(rows, Policy()), rows, tmp_path, "pack_switched")
    turned = {
        "MKL_CBWR": "COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env={**os.environ, **turned},
        capture_output=True,
        text=True,
        check=True,
    )
    table, warned = json.loads(done.stdout)
    assert table.startswith("refused: ")
    expected = [
        "MKL_CBWR: its default != COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS: its default != SSE4_2",
        "ONEDNN_MAX_CPU_ISA: its default != SSE41",
        "OMP_WAIT_POLICY: its default != PASSIVE",
        "torch.backends.mkldnn.enabled: its default != False",
        "torch.use_deterministic_algorithms: its default != on",
    ]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        expected.append("!= DEFAULT (ATEN_CPU_CAPABILITY sets it)")
    for line in expected:
        assert line in table and any(line in each for each in warned), line
