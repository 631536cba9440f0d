"""Settings of a process that change which code PyTorch's libraries run, or how its threads meet.

Where a library says what it does, it is asked; of the others, the variables that they read are taken. What is at
its default is left out, so that an empty text is a process that nobody told anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch

ONEDNN = ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE", "PRIMITIVE_CACHE_CAPACITY")
"""Read with the prefix ``ONEDNN_``, and where there is none with ``DNNL_``."""

OPENMP = (
    *("OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_SCHEDULE"),
    *("OMP_MAX_ACTIVE_LEVELS", "OMP_NESTED", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT"),
    *("KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_HW_SUBSET", "KMP_LIBRARY"),
)
MEMORY = (
    *("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"),
    *("MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "THP_MEM_ALLOC_ENABLE"),
)
"""What memory for outputs costs, by glibc or an allocator in its place, and by PyTorch's large pages.
``LD_PRELOAD`` brings another allocator or OpenMP, such as jemalloc or Intel's: files count by
their names, wherever they lie."""
CPU = (
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_DYNAMIC", "MKL_DOMAIN_NUM_THREADS"),
    *("MKL_NUM_STRIPES", "MKL_DISABLE_FAST_MM", "MKL_THREADING_LAYER", "MKL_FAST_MEMORY_LIMIT"),
    *("FBGEMM_ENABLE_INSTRUCTIONS", "FBGEMM_FORCE_AUTOVEC", "FBGEMM_NO_AUTOVEC", "FBGEMM_NO_ASMJIT"),
    *("TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE"),
    *MEMORY,
    *OPENMP,
)
CUDA = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_CUDNN_USE_HEURISTIC_MODE_B", "DISABLE_ADDMM_CUDA_LT"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_EMULATION_STRATEGY"),
    *("CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION"),
)
_OFF = ("", "0", "FALSE", "NO", "OFF")
_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "ONEDNN_MAX_CPU_ISA": ("", "ALL", "DEFAULT"),
    "ONEDNN_CPU_ISA_HINTS": ("", "NO_HINTS"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "MKL_CBWR": ("", "OFF"),
    "MKL_DYNAMIC": ("", "TRUE", "1"),
    "THP_MEM_ALLOC_ENABLE": ("", "0"),
    **dict.fromkeys(("OMP_PROC_BIND", "OMP_DYNAMIC", "OMP_NESTED", "CUDA_LAUNCH_BLOCKING"), _OFF),
}
"""Values of a variable, in capitals, that mean the same as none."""

_MAX_VALUE, _MAX_TEXT = 80, 900  # characters: the text is a field of evidence and manifests


def switches(device: str, variables: Mapping[str, str]) -> str:
    """What is not at its default for a kind of device: ``NAME=value NAME=value``, by name.

    Args:
        device: ``cpu`` or ``cuda``.
        variables: the process's environment.
    """
    found = {**_variables(device, variables), **_asked(_BOTH)}
    found |= _asked(_OF_CUDA) | _python_native() if device == "cuda" else _asked(_OF_CPU) | _threads()
    text = " ".join(f"{name}={_plain(found[name])}" for name in sorted(found))
    # So many at once are nobody's doing but a test's; two such processes are still told apart.
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} more={sha256(text.encode()).hexdigest()[:16]}"


def capability() -> str:
    """The instructions that PyTorch's own kernels use, such as AVX2; ``ATEN_CPU_CAPABILITY`` takes some away."""
    return torch.backends.cpu.get_cpu_capability()


def differences(mine: str, theirs: str) -> list[str]:
    """A line for each switch that is another one, with both values."""
    ours, others = _parsed(mine), _parsed(theirs)
    names = [name for name in sorted(ours.keys() | others.keys()) if ours.get(name) != others.get(name)]
    return [f"{name}: {ours.get(name, _DEFAULT)} != {others.get(name, _DEFAULT)}" for name in names]


def openmp(text: str) -> list[tuple[str, str, str]]:
    """Of each of OpenMP's variables: name, value in ``text``, and other words for its default, each between blanks.

    Of an unknown text, each value is the text: it is what no process has.
    """
    named = _parsed(text) if "=" in text or not text else dict.fromkeys(OPENMP, text)
    return [(name, named.get(name, ""), f" {' '.join(_DEFAULTS.get(name, ()))} ") for name in OPENMP]


_DEFAULT = "its default"


def _parsed(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in text.split())}


def _plain(value: str) -> str:
    """One word that shows as it is."""
    word = re.sub(r"\s+", "_", value.strip())
    if word.isprintable() and len(word) <= _MAX_VALUE:
        return word
    return f"{ascii(word)[1:-1][:40]}...{sha256(value.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _variables(device: str, variables: Mapping[str, str]) -> dict[str, str]:
    found = {name: variables.get(name, "") for name in (CUDA if device == "cuda" else CPU)}
    if device != "cuda":
        for name in ONEDNN:
            found[f"ONEDNN_{name}"] = variables.get(f"ONEDNN_{name}", variables.get(f"DNNL_{name}", ""))
        files = found["LD_PRELOAD"].replace(":", " ").split()
        found["LD_PRELOAD"] = ":".join(file.rpartition("/")[2] for file in files)
    upper = {name: value.strip().upper() for name, value in found.items()}  # libraries do not mind the case
    return {name: value for name, value in upper.items() if value not in _DEFAULTS.get(name, ("",))}


def _threads() -> dict[str, str]:
    """MKL's threads, where they are not PyTorch's: ``MKL_NUM_THREADS`` is for MKL alone."""
    said = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return {} if said is None or int(said[1]) == torch.get_num_threads() else {"MKL_NUM_THREADS": said[1]}


Asked = Iterable[tuple[str, Callable[[], Any], Any]]
"""Names as users write them, what says the value, and the default."""


def _asked(of: Asked) -> dict[str, str]:
    found = {}
    for name, ask, default in of:
        try:
            value = ask()
        # This PyTorch has no such switch; or its newer one was used, which stands below for itself.
        except (AttributeError, RuntimeError):
            continue
        if value != default:
            found[name] = str(value)
    return found


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "off"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "on"


def _precision(backend: Any) -> str:
    """Of float32 products: what the operator says, else its library, else all of PyTorch."""
    said: list[str] = [backend.matmul.fp32_precision]  # AttributeError in a PyTorch that has none
    said += [each.fp32_precision for each in (backend, _BACKENDS) if hasattr(each, "fp32_precision")]
    return next((value for value in said if value != "none"), "ieee")


_BACKENDS: Any = torch.backends
_BOTH: Asked = (
    ("torch.use_deterministic_algorithms", _deterministic, "off"),
    ("torch.set_float32_matmul_precision", torch.get_float32_matmul_precision, "highest"),
    ("torch.backends.cuda.enable_flash_sdp", _BACKENDS.cuda.flash_sdp_enabled, True),
    ("torch.backends.cuda.enable_mem_efficient_sdp", _BACKENDS.cuda.mem_efficient_sdp_enabled, True),
    ("torch.backends.cuda.enable_math_sdp", _BACKENDS.cuda.math_sdp_enabled, True),
    ("torch.backends.cuda.enable_cudnn_sdp", _BACKENDS.cuda.cudnn_sdp_enabled, True),
    (
        "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp",
        _BACKENDS.cuda.fp16_bf16_reduction_math_sdp_allowed,
        False,
    ),
)
_OF_CPU: Asked = (
    ("torch.backends.mkldnn.enabled", lambda: _BACKENDS.mkldnn.enabled, True),
    ("torch.backends.mkldnn.deterministic", lambda: _BACKENDS.mkldnn.deterministic, False),
    ("torch.backends.mkldnn.matmul.fp32_precision", lambda: _precision(_BACKENDS.mkldnn), "ieee"),
    # Nobody says it, but arithmetic shows it: half of the smallest normal number.
    ("torch.set_flush_denormal", lambda: sys.float_info.min * 0.5 == 0.0, False),
)
_OF_CUDA: Asked = (
    ("torch.backends.cuda.matmul.allow_tf32", lambda: _BACKENDS.cuda.matmul.allow_tf32, False),
    ("torch.backends.cuda.matmul.fp32_precision", lambda: _precision(_BACKENDS.cuda), "ieee"),
    (
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
        lambda: _BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        True,
    ),
    (
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
        lambda: _BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction,
        True,
    ),
    (
        "torch.backends.cuda.matmul.allow_fp16_accumulation",
        lambda: _BACKENDS.cuda.matmul.allow_fp16_accumulation,
        False,
    ),
    ("torch.backends.cudnn.enabled", lambda: _BACKENDS.cudnn.enabled, True),
    ("torch.backends.cudnn.allow_tf32", lambda: _BACKENDS.cudnn.allow_tf32, True),
    ("torch.backends.cudnn.deterministic", lambda: _BACKENDS.cudnn.deterministic, False),
    ("torch.backends.cudnn.benchmark", lambda: _BACKENDS.cudnn.benchmark, False),
    (
        "torch.backends.cuda.preferred_blas_library",
        lambda: _BACKENDS.cuda.preferred_blas_library().name,
        "Cublas",
    ),
)


def _python_native() -> dict[str, str]:
    """Which kernels in Python PyTorch 2.13 and later put in the place of their own, of those that are installed."""
    try:
        native: Any = _BACKENDS.python_native
        on = [name for name in native.available_dsls if getattr(native, name).enabled]
        filters = native._get_filter_state()
        off = sorted(str(each) for each in (*filters._op_symbols, *filters._dispatch_keys))
    except AttributeError:
        return {}
    found = {"torch.backends.python_native": "+".join(sorted(on)) or "none"}
    return found | ({"torch.backends.python_native.disabled": "+".join(off)} if off else {})
