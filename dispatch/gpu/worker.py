"""The process that compiles: a request a line, an answer a line. Run as a file, not as a module of DKS.

It imports Triton and kernel sources, and nothing else of ours: PyTorch, which DKS imports, would cost each of these
processes seconds and memory. So ``dks.dispatch.gpu`` is made here, of nothing but a path to the kernels.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


def main(sources: str) -> None:
    """Answer requests until there are no more. ``sources`` is the folder of the kernels."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a compiler prints is no answer
    own = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own]  # its names are none for everybody
    for name in ("dks", "dks.dispatch", "dks.dispatch.gpu", "dks.dispatch.gpu.kernels"):
        package = ModuleType(name)
        package.__path__ = [sources] if name.endswith("kernels") else []
        sys.modules[name] = package
    for line in sys.stdin:
        try:
            answer = compile_one(json.loads(line))
        # A compiler fails in as many ways as it has authors, and this process is there to say how.
        except Exception as error:
            answer = {"why": f"{type(error).__name__}: {error}"}
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)  # a megabyte each, and never asked again
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one program into ``request["out"]`` with ``.cubin`` and ``.ptx``; what the compiler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"dks.dispatch.gpu.kernels.{Path(request['source']).stem}")
    function = getattr(module, request["function"])
    types, constants = dict(request["arguments"]), dict(request["constants"])
    if set(function.arg_names) != {*types, *constants} or len(function.arg_names) != len(types) + len(constants):
        raise ValueError(
            f"{request['function']} takes {', '.join(function.arg_names)}; the program has arguments "
            f"{', '.join(types)} and constants {', '.join(constants)}"
        )
    order = [name for name in function.arg_names if name in types]
    if order != list(types):
        raise ValueError(f"{request['function']} takes {', '.join(order)} in this order, found {', '.join(types)}")
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs={name: _constant(value) for name, value in constants.items()},
        attrs={
            (function.arg_names.index(name),): [["tt.divisibility", divisor]]
            for name, divisor in request["divisible"]
        },
    )
    target = GPUTarget("cuda", request["arch"], 32)
    options = {"num_warps": request["warps"], "num_stages": request["stages"]}
    compiled = triton.compile(source, target=target, options=options)
    out = Path(request["out"])
    out.with_suffix(".cubin").write_bytes(compiled.asm["cubin"])
    out.with_suffix(".ptx").write_text(compiled.asm["ptx"], encoding="utf-8")
    said = compiled.metadata
    if getattr(said, "profile_scratch_size", 0):
        raise ValueError("the code measures itself: it was compiled with instruments")
    if getattr(said, "num_ctas", 1) != 1 or getattr(said, "launch_cooperative_grid", False):
        raise ValueError("it needs a launch of clusters or a cooperative one, which the launcher has not")
    return {
        "why": "",
        "function": said.name,
        "warps": said.num_warps,
        "shared": said.shared,
        "tensor_memory": getattr(said, "tmem_size", None) or 0,
        "scratch": getattr(said, "global_scratch_size", 0),
        "scratch_align": getattr(said, "global_scratch_align", 1) or 1,
        **_usage(Path(triton.__file__).parent, out.with_suffix(".cubin")),
    }


def _constant(value: int | str) -> Any:
    """A dtype by its name, anything else as it is."""
    import triton.language as tl

    known = [*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES]
    return tl.dtype(value) if value in known else value


def _usage(triton: Path, cubin: Path) -> dict[str, int | None]:
    """Registers, stack and local memory of a thread, as Triton's own ``cuobjdump`` has them, or nothing known."""
    tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    found: dict[str, int] = {}
    if tool.is_file():
        done = subprocess.run(
            [tool, "-res-usage", cubin], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        found = {name: int(value) for name, value in _USAGE.findall(done.stdout)}
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    return {ours: found.get(theirs) for ours, theirs in names.items()}


if __name__ == "__main__":
    main(sys.argv[1])
