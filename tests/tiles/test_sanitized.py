"""Generated kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, on ragged sizes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dks.dispatch.compiler import find_compiler
from dks.dispatch.tiles import build
from dks.dispatch.tiles.unit import HEADERS, Unit

PROGRAM = Path(__file__).parent / "sanitized.cpp"
VECTORS = {"avx2": ("dks::Avx2", 8), "avx512": ("dks::Avx512", 16)}
GEMMS = (  # constants of FmaGemm that between them take every branch of it
    ("avx512", "float", "float", "3, 2, 24, true, 4"),
    ("avx512", "float", "dks::bf16", "4, 3, 0, false, 8"),
    ("avx2", "dks::bf16", "float", "4, 2, 0, true, 0"),
    ("avx2", "float", "int8_t", "2, 2, 16, false, 8"),
    ("avx512", "dks::bf16", "int8_t", "5, 1, 0, true, 2"),
)
DOTS = (  # header, template, x, constants, panel; emulated where this machine may have no such instructions
    ("avx512_vnni", "gemm_dot.hpp", "DotGemm<dks::DotInt8", "float", "3, 2, 64, 1", 32),
    ("avx512", "gemm_dot.hpp", "DotGemm<dks::DotBf16", "dks::bf16", "2, 3, 32, 0", 48),
    ("avx512", "gemm_amx.hpp", "AmxGemm<dks::AmxInt8", "dks::bf16", "2, 2, 64, true, 1", 32),
    ("avx512", "gemm_amx.hpp", "AmxGemm<dks::AmxBf16", "float", "1, 3, 0, true, 1", 48),
    ("avx512", "gemm_amx.hpp", "AmxGemm<dks::AmxBf16", "dks::bf16", "2, 2, 0, false, 0", 32),
)
ROWS = (
    ("avx512", "norm", "LayerNorm", "float", "2, 4, true"),
    ("avx2", "norm", "RmsNorm", "dks::bf16", "2, 3, false"),
    ("avx2", "softmax", "Softmax", "float", "2, 4"),
    ("avx512", "softmax", "Softmax", "dks::bf16", "2, 4"),
)
DECODES = (("avx512", "dks::bf16", "32, true"), ("avx2", "float", "16, false"))
"""Few and small, since most of the time goes into compiling them."""


def cases() -> Iterator[tuple[Unit, str]]:
    """Kernels with the calls that test them, ``ROUNDS`` in the place of how many."""
    for isa, x, w, constants in GEMMS:
        vector, width = VECTORS[isa]
        panel = int(constants.split(",")[1]) * width
        made = unit(isa, "linear", "gemm_fma.hpp", f"FmaGemm<{vector}, {x}, {w}, {constants}>")
        yield made, f"linear<{x}, {w}, Form<{panel}>>({made.symbol}, "
    for isa, header, template, x, constants, panel in DOTS:
        made = unit(isa, "linear", header, f"{template}, {x}, {constants}>")
        w, group, rounds = ("int8_t", 4, "TO_INT8") if "Int8" in template else ("dks::bf16", 2, "TO_BF16")
        step = 16 * group if "Amx" in template else group
        yield made, f"linear<{x}, {w}, Form<{panel}, {group}, {step}, {rounds}>>({made.symbol}, "
    for isa, x, panel in (("avx512", "dks::bf16", 64), ("avx2", "float", 16)):
        vector, width = VECTORS[isa]
        made = unit(isa, "linear", "gemm_int4.hpp", f"Int4Gemm<{vector}, {x}, 4, {panel // width}, 32, 16>")
        yield made, f"linear_int4<{x}, {panel}, 32>({made.symbol}, "
    for isa, kind, template, x, constants in ROWS:
        made = unit(isa, kind, "rows.hpp", f"{template}<{VECTORS[isa][0]}, {x}, {constants}>")
        arguments = x if kind == "softmax" else f"{x}, {'true' if template == 'LayerNorm' else 'false'}"
        yield made, f"{kind}<{arguments}>({made.symbol}, "
    for isa, x, constants in DECODES:
        made = unit(isa, "decode", "decode.hpp", f"Decode<{VECTORS[isa][0]}, {x}, {constants}>")
        yield made, f"decode<{x}>({made.symbol}, "


def unit(isa: str, kind: str, header: str, template: str) -> Unit:
    return Unit("test_" + re.sub(r"\W+", "_", template).strip("_"), isa, kind, header, f"dks::{template}")


def here() -> list[tuple[Unit, str]]:
    """Those that this machine can run."""
    return [(made, call) for made, call in cases() if made.needs.lack() is None]


PARTS = 2  # compiled beside each other
SOAK = os.environ.get("DKS_SOAK") == "1"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEXACT_SCRATCH"),
    "thread": ("-fsanitize=thread",),
}


@pytest.mark.parametrize(("sanitizer", "rounds"), [("address", 210 if SOAK else 70), ("thread", 12)])
def test_on_exactly_sized_memory(sanitizer: str, rounds: int, tmp_path: Path) -> None:
    compiler, lack = find_compiler()
    known = here()
    if lack or not known:
        pytest.skip(lack or "no vectors on this machine")
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-w", "-DDKS_EMULATE"]
    command = [*compiler, *flags, *SANITIZERS[sanitizer]]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    empty = subprocess.run([*command, probe, "-o", tmp_path / "probe"], capture_output=True, check=False)
    if empty.returncode or subprocess.run([tmp_path / "probe"], capture_output=True, check=False).returncode:
        pytest.skip(f"no {sanitizer} sanitizer here")
    with ThreadPoolExecutor(PARTS) as pool:  # most of the time goes into compiling
        done = [
            pool.submit(run_sanitized, command, known[part::PARTS], rounds, tmp_path / str(part))
            for part in range(PARTS)
        ]
    for part in done:
        assert part.result().returncode == 0, (part.result().stdout + part.result().stderr)[-4000:]
        assert " 0 wrong" in part.result().stdout


def run_sanitized(
    command: Sequence[str], known: Sequence[tuple[Unit, str]], rounds: int, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Compile the program with these kernels, and run it; what failed, if it did not compile."""
    folder.mkdir()
    (folder / "units.cpp").write_text(build.source([made for made, _ in known]))
    # Emulated tiles take their time.
    turns = [rounds // 5 if "Amx" in made.type else rounds for made, _ in known]
    calls = "".join(f'  {call}"{made.symbol}", {n});\n' for (made, call), n in zip(known, turns, strict=True))
    (folder / "cases.inc").write_text(calls)
    options = dict.fromkeys(option for made, _ in known for option in made.needs.options)
    places = ["-iquote", str(HEADERS), "-iquote", str(folder)]
    made = subprocess.run(
        [*command, *options, *places, PROGRAM, "-o", folder / "run"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return made
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([folder / "run"], env=environment, capture_output=True, text=True, check=False)
