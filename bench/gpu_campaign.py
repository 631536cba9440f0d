"""What ``scripts/gpu_campaign.sh`` asks of Python, a function a word of its command line.

    python -m bench.gpu_campaign missing               files in wheels/ that this Python lacks, one a line
    python -m bench.gpu_campaign manifest FILE         versions and commit, as JSON
    python -m bench.gpu_campaign build CONFIG...       compile what these sweeps will launch
    python -m bench.gpu_campaign luts RUN LUT FOLDER   a run and its table, in the form that luts/ has

Only the first one runs before anything is installed, with the standard library alone.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    *("torch", "triton", "numpy", "scipy", "pandas", "pyarrow", "pydantic", "pydantic-core", "psutil", "pytest"),
    *("click", "jinja2", "pyyaml", "rich", "nvidia-cutlass"),
)
"""What the commands, the tests and compiling import."""
NEWER = ("pydantic", "pydantic_core", "typing_extensions")
"""Replaced where the machine's are older, as they must fit each other. Of the rest the machine's own is taken."""
MOST_MB = 8.0
"""Of a run's rows in one file; more is too much for git, and said."""


def missing() -> int:
    """Print the wheels of what this Python has not, or too old; 2 where something is in neither."""
    brought = {}
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        brought[_plain(name)] = version
        have = _version(name)
        if not have or (have < _numbers(version) and name in NEWER):
            print(wheel)
    lacks = [name for name in NEEDED if not _version(name) and _plain(name) not in brought]
    if lacks:
        step = "run scripts/gpu_wheels.sh where there is a network, and carry wheels/"
        print(f"found neither installed nor in wheels/: {', '.join(lacks)}; {step}", file=sys.stderr)
    return 2 if lacks else 0


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> tuple[int, ...]:
    try:
        return _numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def manifest(path: str) -> int:
    """Write what was where: packages, device, commit."""
    from bench.gpu import NotHere
    from bench.gpu_run import gpu_state
    from bench.report import commit
    from dks.dispatch.environment import Environment

    try:
        environment: object = Environment.current("cuda:0").to_dict()
    except (NotHere, ValueError) as error:
        environment = str(error)
    found = {
        "commit": commit(),
        "environment": environment,
        "gpu": gpu_state(),
        "python": platform.python_version(),
        "packages": dict(sorted((each.name, each.version) for each in metadata.distributions())),
    }
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


def build(*configs: str) -> int:
    """Compile all that the sweeps will launch, and what launches it; what is in the cache is not compiled again."""
    from dks.dispatch.gpu import embed
    from dks.dispatch.gpu.cublaslt import build as cublaslt
    from dks.dispatch.native import build as native
    from dks.profiler.compiling import compile_for
    from dks.profiler.config import load
    from dks.profiler.isolation import environment_of

    print(f"launcher: {embed.launcher()}")
    for what, (path, why) in {"cuBLASLt": cublaslt.cached(), "fast path": native.cached()}.items():
        print(f"{what}: {path or why}")
    for config in configs:
        print(config, flush=True)
        sweep = load(config)
        environment = environment_of(sweep.device)
        for part in sweep.operators:
            pairs = ((each.problem, candidate) for each in part.problems for candidate in part.candidates)
            compile_for(pairs, print, environment)
    return 0


def luts(run: str, lut: str, folder: str) -> int:
    """FOLDER/DEVICE/NAME with all rows of the run in one Parquet file, and FOLDER/DEVICE/NAME.lut.json."""
    from dks.dispatch.evidence import environment_of, read_run, write_rows

    rows = read_run(Path(run))
    name = Path(lut).parent.name
    device = Path(folder) / environment_of(rows[0]).slug
    (device / name).mkdir(parents=True, exist_ok=True)
    packed = device / name / f"{name}.parquet"
    write_rows(packed, rows)
    shutil.copy(Path(run) / "_run.json", device / name)
    shutil.copy(lut, device / f"{name}.lut.json")
    size = packed.stat().st_size / 1e6
    print(f"{packed}: {len(rows)} rows, {size:.1f} MB")
    if size > MOST_MB:
        print(f"{packed}: found {size:.1f} MB, expected at most {MOST_MB:.0f}: leave it out of git")
    return 0


WORDS: Mapping[str, Callable[..., int]] = {"missing": missing, "manifest": manifest, "build": build, "luts": luts}


def main(words: Sequence[str]) -> int:
    if not words or words[0] not in WORDS:
        print(f"found {' '.join(words) or 'nothing'}, expected one of: {', '.join(WORDS)}", file=sys.stderr)
        return 2
    return WORDS[words[0]](*words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
