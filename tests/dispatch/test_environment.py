"""The environment: what differs is named, and what is unknown equals nothing."""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dks.dispatch import environment
from dks.dispatch.environment import UNKNOWN, Environment

FIELDS = [field.name for field in fields(Environment)]
ONE = Environment(**{name: f"some {name}" for name in FIELDS})


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


def test_a_container_that_hides_the_driver_s_file_has_its_library(tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "nvml.so"
    source.write_text(
        "int nvmlInit_v2(void) { return 0; } int nvmlShutdown(void) { return 0; }\n"
        "int nvmlSystemGetDriverVersion(char *to, unsigned size) {\n"
        '  const char *v = "580.65.06"; while ((*to++ = *v++)) {} return size < 80; }\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert environment._driver(tmp_path / "none", str(library)) == "580.65.06"
    source.write_text("int nvmlInit_v2(void) { return 9; } int nvmlSystemGetDriverVersion(void) { return 0; }\n")
    refusing = tmp_path / "refusing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", refusing, source], check=True)
    assert environment._driver(tmp_path / "none", str(refusing)) == UNKNOWN


def test_no_driver_is_unknown(tmp_path: Path) -> None:
    assert environment._driver(tmp_path / "none") == UNKNOWN


@pytest.mark.parametrize("name", FIELDS)
def test_any_field_that_differs_is_named(name: str) -> None:
    other = dataclasses.replace(ONE, **{name: "other"})
    assert ONE.diff(other) == [f"{name}: some {name} != other"]
    assert other.diff(ONE) == [f"{name}: other != some {name}"]


@pytest.mark.parametrize("name", FIELDS)
def test_unknown_equals_nothing_itself_included(name: str) -> None:
    unknown = dataclasses.replace(ONE, **{name: UNKNOWN})
    assert unknown.diff(unknown) == [f"{name}: unknown != unknown"]
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
