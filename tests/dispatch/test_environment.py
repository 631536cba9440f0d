"""The environment: what differs is named, and what is unknown equals nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dks.dispatch import compiler, environment
from dks.dispatch.environment import UNKNOWN, Environment

FIELDS = [field.name for field in fields(Environment)]
ONE = Environment(**{name: f"some {name}" for name in FIELDS} | {"switches": "MKL_CBWR=AVX2"})


def test_this_machine_fits_itself() -> None:
    here = Environment.current()
    assert here.device == "cpu" and here.driver == "none" and here.torch == torch.__version__
    assert here.threads == str(torch.get_num_threads())
    assert UNKNOWN not in here.to_dict().values() and here.diff(Environment.current()) == []
    assert Environment.from_dict(here.to_dict()) == here


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("tpu", "found 'tpu', expected cpu, cuda or cuda:0"),
        ("cuda:x", "found 'cuda:x'"),
        ("cuda", "found 'cuda', expected cpu: PyTorch sees no NVIDIA GPU"),
    ],
)
def test_devices_that_are_not_here_are_refused(device: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=match):
        Environment.current(device)


@pytest.mark.parametrize(("count", "match"), [(1, "expected cuda:0$"), (8, "expected cuda:0 to cuda:7$")])
def test_devices_that_are_here_are_named(count: int, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=match):
        Environment.current("cuda:9")


VERSIONS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 01:35:32 UTC 2025\nGCC version:  gcc": (
        "570.124.06"
    ),
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x@y)\n": "580.65.06",
    "something else 1.2\n": UNKNOWN,
}


@pytest.mark.parametrize("text", VERSIONS)
def test_a_gpu_is_described_by_what_decides_its_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "version").write_text(text)
    gpu = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: [None, gpu][index])
    read = environment._driver
    monkeypatch.setattr(environment, "_driver", lambda: read(tmp_path / "version"))
    found = Environment.current("cuda:1")
    assert (found.device, found.arch, found.isa) == ("cuda", "NVIDIA H200 132 SMs", "sm_90")
    assert found.driver == VERSIONS[text] and found.threads == "none"
    assert found.slug == "cuda-nvidia-h200-132-sms"


def test_no_driver_is_unknown(tmp_path: Path) -> None:
    assert environment._driver(tmp_path / "none", "libno-such-nvml.so") == UNKNOWN


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) { strncpy(text, "580.159.03", size); return CODE; }
"""


@pytest.mark.parametrize(("codes", "said"), [("00", "580.159.03"), ("90", UNKNOWN), ("03", UNKNOWN)])
def test_a_sandbox_without_the_modules_file_is_asked_through_nvml(tmp_path: Path, codes: str, said: str) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(NVML)
    flags = [f"-DINIT={codes[0]}", f"-DCODE={codes[1]}", "-x", "c", "-fPIC", "-shared"]
    if why := compiler.build(library, [*flags, str(source)]):
        pytest.skip(why)
    assert environment._driver(tmp_path / "none", str(library)) == said


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "switches"])
def test_any_field_that_differs_is_named(name: str) -> None:
    other, by = (
        dataclasses.replace(ONE, **{name: "other"}),
        " (ATEN_CPU_CAPABILITY sets it)" * (name == "capability"),
    )
    assert ONE.diff(other) == [f"{name}: some {name} != other{by}"]
    assert other.diff(ONE) == [f"{name}: other != some {name}{by}"]


def test_each_switch_that_differs_is_named() -> None:
    one = dataclasses.replace(ONE, switches="MKL_CBWR=AVX2 OMP_PLACES=CORES OMP_WAIT_POLICY=ACTIVE")
    other = dataclasses.replace(ONE, switches="MKL_CBWR=AVX2 OMP_WAIT_POLICY=PASSIVE")
    assert one.diff(other) == ["OMP_PLACES: CORES != its default", "OMP_WAIT_POLICY: ACTIVE != PASSIVE"]
    assert other.diff(one) == ["OMP_PLACES: its default != CORES", "OMP_WAIT_POLICY: PASSIVE != ACTIVE"]
    assert one.diff(one) == []


def test_what_earlier_versions_did_not_write_is_unknown() -> None:
    data = {name: value for name, value in ONE.to_dict().items() if name not in ("capability", "switches")}
    old = Environment.from_dict(data)
    assert (old.capability, old.switches) == (UNKNOWN, UNKNOWN)
    assert [line.partition(":")[0] for line in old.diff(old)] == ["capability", "switches"]


@pytest.mark.parametrize("name", FIELDS)
def test_unknown_equals_nothing_itself_included(name: str) -> None:
    unknown = dataclasses.replace(ONE, **{name: UNKNOWN})
    by = " (ATEN_CPU_CAPABILITY sets it)" * (name == "capability")
    assert unknown.diff(unknown) == [f"{name}: unknown != unknown{by}"]
    assert len(ONE.diff(unknown)) == len(unknown.diff(ONE)) == 1


@pytest.mark.parametrize(
    "change", [lambda d: d.pop("arch"), lambda d: d.update(colour="red"), lambda d: d.update(threads=4)]
)
def test_from_dict_refuses_anything_else(change: object) -> None:
    data = ONE.to_dict()
    change(data)  # type: ignore[operator]
    with pytest.raises(ValueError, match="environment"):
        Environment.from_dict(data)


def test_names_for_people_and_folders() -> None:
    env = dataclasses.replace(ONE, device="cpu", arch="GenuineIntel 6 85/7", isa="avx2+avx512f")
    assert env.machine == "cpu GenuineIntel 6 85/7 avx2+avx512f"
    assert env.slug == "cpu-genuineintel-6-85-7"


def test_a_machine_that_says_nothing_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpuinfo", dict)
    here = Environment.current()
    assert here.isa == UNKNOWN and here.arch == UNKNOWN
    assert {line.partition(":")[0] for line in here.diff(here)} == {"isa", "arch"}


def test_arm_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"CPU implementer": "0x41", "CPU part": "0xd40", "Features": "fp asimd sve bf16 i8mm"}
    monkeypatch.setattr(environment, "_cpuinfo", lambda: info)
    here = Environment.current()
    assert here.isa == "sve+asimd+bf16+i8mm" and here.arch.endswith("0x41 0xd40")


def test_changed_threads_are_another_environment() -> None:
    here, threads = Environment.current(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert here.diff(Environment.current()) == [f"threads: {threads} != {threads + 1}"]
    finally:
        torch.set_num_threads(threads)


def test_private_cache_is_a_plausible_size() -> None:
    size = environment.private_cache_bytes()
    assert size is None or 2**14 <= size <= 2**28
