"""Tests that need an NVIDIA GPU: marked ``gpu``, skipped elsewhere, run by ``scripts/gpu_campaign.sh tests``.

They take what users take: the commands, on configs/gpu-smoke.yaml, and the package that comes of it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]
LACK = "" if torch.cuda.is_available() else "needs an NVIDIA GPU, and PyTorch sees none here"
BUDGET = "150s"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if LACK:
                item.add_marker(pytest.mark.skip(reason=LACK))


@dataclass(frozen=True)
class Made:
    """A sweep's folder and the package that was built from it."""

    run: Path
    package: ModuleType


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("smoke")
    run, out = folder / "run", folder / "out"
    config = ROOT / "configs" / "gpu-smoke.yaml"
    # 1: finished, with candidates that failed; which ones may is for a test to say.
    assert command("dks-profile", "run", str(config), "-o", str(run), "--budget", BUDGET) in (0, 1)
    assert command("dks-codegen", "build", str(run), "-o", str(out), "--name", "gpu_smoke") == 0
    sys.path.insert(0, str(out))
    return Made(run, importlib.import_module("gpu_smoke"))


def command(name: str, *words: str) -> int:
    """Run one of the two commands as this Python would; its exit code."""
    module = {"dks-profile": "profiler", "dks-codegen": "codegen"}[name]
    # Triton's interpreter is for tests without a GPU, and tests/conftest.py asks for it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = f"import sys; from dks.{module}.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *words], env=environment, check=False).returncode
