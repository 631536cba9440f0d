"""The project's own commands, run as a user would run them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from bench.report import ROOT

PROFILE = ROOT / "runs" / "minilm"  # shared by the demo and the benchmarks: measured once
CONFIG = ROOT / "configs" / "minilm.yaml"
BUDGETS = {"minilm_exact": "1e-5", "minilm_bf16": "1e-2"}


def command(*words: object) -> None:
    """Run one of the project's commands, and stop where it fails."""
    line = [str(word) for word in words]
    print("$", *line, flush=True)
    done = subprocess.run([str(Path(sys.executable).parent / line[0]), *line[1:]], check=False)
    # 1 from the profiler says that some candidate failed: its bins have the default.
    if done.returncode not in ((0, 1) if line[0] == "dks-profile" else (0,)):
        sys.exit(done.returncode)


def profile(config: Path, folder: Path, *more: str) -> None:
    """Measure what ``folder`` does not hold yet."""
    command("dks-profile", "run", config, "-o", folder, *more)


def packages(folder: Path, out: Path) -> Mapping[str, ModuleType]:
    """Generate and import one package for each error budget."""
    for name, budget in BUDGETS.items():
        command("dks-codegen", "build", folder, "-o", out, "--name", name, "--max-error", budget)
    sys.path.insert(0, str(out))
    return {name: importlib.import_module(name) for name in BUDGETS}
