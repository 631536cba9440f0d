"""The machine and libraries a measurement is valid for."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

from dks.dispatch.switches import capability, differences, switches

UNKNOWN = "unknown"
MAX_TEXT = 1000  # characters of a field; ours take some forty

_LATER = ("capability", "switches")
"""Fields that evidence and packages of earlier versions do not have."""

_SET_BY = {"capability": " (ATEN_CPU_CAPABILITY sets it)"}

# Instruction sets that decide which CPU kernels exist; the rest of /proc/cpuinfo's flags does not matter.
_ISA = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_int8", "amx_fp16", "sve", "asimd", "bf16", "i8mm",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Environment:
    """What must be equal for a measurement to hold. Every field is text; ``unknown`` equals nothing.

    Attributes:
        device: ``cpu`` or ``cuda``.
        arch: CPU vendor, family, model, stepping; GPU name and how many multiprocessors: a part of one
            has fewer.
        isa: instruction sets that kernels are chosen by; the compute capability, as in ``sm_90``.
        driver: GPU driver; ``none`` on a CPU.
        torch: version with its build tag.
        libraries: versions of the math libraries inside torch.
        threads: intra-op threads that torch was measured with; ``none`` on a GPU.
        capability: instructions that PyTorch's own kernels use, whatever the CPU has; ``none`` on a GPU.
        switches: settings of the process that change which code runs, where they are not at their defaults:
            ``NAME=value NAME=value``; see ``switches``.

    All of it is as it is when it is asked; an application may turn a switch later.
    """

    device: str
    arch: str
    isa: str
    driver: str
    torch: str
    libraries: str
    threads: str
    capability: str
    switches: str

    @classmethod
    def current(cls, device: str = "cpu") -> Environment:
        """This process on this machine.

        Raises:
            ValueError: there is no such device here.
        """
        if device != "cpu":
            return cls(**_cuda(device))
        info = _cpuinfo()
        flags = cpu_flags()
        return cls(
            device="cpu",
            arch=_cpu_arch(info),
            isa=("+".join(name for name in _ISA if name in flags) or "baseline") if info else UNKNOWN,
            driver="none",
            torch=str(torch.__version__),
            libraries=_libraries(),
            threads=str(torch.get_num_threads()),
            capability=capability(),
            switches=switches("cpu", os.environ),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> Environment:
        """The inverse of ``to_dict``. What earlier versions did not write is unknown.

        Raises:
            ValueError: a field is missing, unknown, or not text of one line that shows as it is.
        """
        names = {f.name for f in fields(cls)}
        data = {**dict.fromkeys(_LATER, UNKNOWN), **data}
        if set(data) != names:
            odd = sorted(set(data) ^ names)
            raise ValueError(f"environment: found missing or unknown fields {odd}, expected {sorted(names)}")
        for name, value in data.items():
            if not isinstance(value, str):
                raise ValueError(f"environment {name}: found {value!r}, expected text")
            # It is shown on terminals and in generated code, where a control character could hide what is there.
            if not value.isprintable() or len(value) > MAX_TEXT:
                raise ValueError(f"environment {name}: found {value[:40]!a}, expected printable text")
        return cls(**data)

    def to_dict(self) -> dict[str, str]:
        """Field names to values, in the order of the class."""
        return asdict(self)

    def diff(self, other: Environment) -> list[str]:
        """One readable line for each field that differs; ``unknown`` differs from everything."""
        lines = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs != UNKNOWN:
                continue
            if field.name == "switches" and UNKNOWN not in (mine, theirs):
                lines += differences(mine, theirs)
            else:
                lines.append(f"{field.name}: {mine or 'none'} != {theirs or 'none'}{_SET_BY.get(field.name, '')}")
        return lines

    @property
    def machine(self) -> str:
        """The hardware alone, without the software and its settings."""
        return " ".join((self.device, self.arch, self.isa))

    @property
    def slug(self) -> str:
        """A folder's name for this device, as under ``luts/``."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.arch}".lower()).strip("-")


def _cuda(device: str) -> dict[str, str]:
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise ValueError(f"device: found {device!r}, expected cpu, cuda or cuda:0")
    index = int(named[1] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        there = (
            f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "cpu: PyTorch sees no NVIDIA GPU"
        )
        raise ValueError(f"device: found {device!r}, expected {there}")
    found = torch.cuda.get_device_properties(index)
    return {
        "device": "cuda",
        "arch": f"{found.name} {found.multi_processor_count} SMs",
        "isa": f"sm_{found.major}{found.minor}",
        "driver": _driver(),
        "torch": str(torch.__version__),
        "libraries": f"cuda-{torch.version.cuda}+cudnn-{torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
        "threads": "none",
        "capability": "none",
        "switches": switches("cuda", os.environ),
    }


def _driver(version: Path = Path("/proc/driver/nvidia/version"), nvml: str = "libnvidia-ml.so.1") -> str:
    """As the kernel's module says it; where a sandbox such as gVisor shows no such file, as NVML does."""
    try:
        text = version.read_text(encoding="utf-8")
    except OSError:
        return _driver_by(nvml)
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else _driver_by(nvml)


def _driver_by(nvml: str) -> str:
    try:
        library = ctypes.CDLL(nvml)
        text = ctypes.create_string_buffer(80)
        if library.nvmlInit_v2() != 0:
            return UNKNOWN
        code = library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return UNKNOWN
    return UNKNOWN if code else text.value.decode("ascii", "replace") or UNKNOWN


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def cpu_flags() -> frozenset[str]:
    """Features of this CPU, as /proc/cpuinfo names them; empty where it can't be read."""
    info = _cpuinfo()
    return frozenset(info.get("flags", info.get("Features", "")).split())


def _cpu_arch(info: Mapping[str, str]) -> str:
    if "vendor_id" in info:
        keys = ("vendor_id", "cpu family", "model", "stepping")
        return " ".join(info.get(k, UNKNOWN) for k in keys)
    keys = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    known = " ".join(info[k] for k in keys if k in info)
    return f"{platform.machine()} {known}" if known else UNKNOWN


@lru_cache(maxsize=1)
def private_cache_bytes() -> int | None:
    """Bytes of the last cache level that one core has to itself (L2 on most machines); None if unknown."""
    best: tuple[int, int] | None = None
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind = (index / "type").read_text().strip()
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        # Level 3 is shared between cores; a hyperthread pair at levels 1 and 2 still counts as one core.
        if kind == "Instruction" or level > 2 or not shared:
            continue
        digits = re.fullmatch(r"(\d+)([KM]?)", size)
        if digits:
            scale = {"": 1, "K": 1024, "M": 1024**2}[digits[2]]
            best = max(best or (0, 0), (level, int(digits[1]) * scale))
    return best[1] if best else None


@lru_cache(maxsize=1)
def _libraries() -> str:
    shown = torch.__config__.show()
    found = [
        f"{name}-{match[1]}"
        for name, pattern in (
            ("mkl", r"Math Kernel Library Version ([\d.]+)"),
            ("onednn", r"MKL-DNN v([\d.]+)"),
        )
        if (match := re.search(pattern, shown))
    ]
    return "+".join(found) or UNKNOWN
