"""``scripts/gpu_campaign.sh``: parts resume, a part that fails or hangs loses nothing of the others; no GPU needed.

Its Python is a stub that notes what it is asked and answers as a test says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from bench import gpu_campaign
from bench.gpu_campaign import luts, main
from dks.dispatch.evidence import read_run, write_rows
from tests.codegen.rows import ENVIRONMENT, row

ROOT = Path(__file__).parent.parent
LUTS = ROOT / "luts" / "cpu-genuineintel-6-85-7"

STUB = r"""#!/usr/bin/env bash
# Stands for Python: notes its words, makes the environment, and does what behaviour/WORD says.
cd "$HOME_OF_TEST"
echo "$*" >>asked
case "$*" in
  "-m venv"*)
    venv=$5
    mkdir -p "$venv/bin" "$venv/lib/python3.12/site-packages"
    cp "$0" "$venv/bin/python"
    ;;
  "-"*venv) cat >/dev/null ;;
esac
for word in behaviour/*; do
  [ -e "$word" ] || continue
  case "$*" in *"$(basename "$word")"*) . "./$word" ;; esac
done
exit 0
"""


class Campaign:
    """A folder with the script, and a stub for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        (folder / "behaviour").mkdir()
        (folder / "bin").mkdir()
        shutil.copy(ROOT / "scripts" / "gpu_campaign.sh", folder / "scripts")
        self.stub = folder / "bin" / "stub"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)
        self.does("dks-profile run", 'mkdir -p "$5"; echo "3 problems measured, 0 reused, 0 unfinished in 1 s"')
        self.does("dks-codegen build", 'mkdir -p "$5/$7"')

    def does(self, words: str, script: str) -> None:
        """What the stub does where its words hold these."""
        (self.folder / "behaviour" / words).write_text(script + "\n")

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "HOME_OF_TEST": str(self.folder),
            "PYTHON": str(self.stub), **settings,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(self.folder / "scripts" / "gpu_campaign.sh"), *words],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith(("-c", "- "))]

    def status(self) -> dict[str, str]:
        lines = (line.split() for line in self.run("status").stdout.splitlines())
        return {words[0]: words[1] for words in lines}

    @property
    def gpu(self) -> Path:
        return self.folder / "runs" / "gpu"


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    folder = tmp_path / "a b é"
    folder.mkdir()
    return Campaign(folder)


def test_a_part_runs_in_an_environment_of_its_own_and_is_done(campaign: Campaign) -> None:
    assert campaign.run().stdout == "next: scripts/gpu_campaign.sh doctor\n"
    done = campaign.run("doctor")
    assert done.returncode == 0 and "== doctor: done (0)" in done.stdout, done.stdout + done.stderr
    asked = campaign.asked()
    assert asked[0] == "-m venv --without-pip --system-site-packages runs/gpu/venv"
    assert asked[1] == "-m bench.gpu_campaign missing"
    assert any(line.endswith("/bin/dks-profile doctor") for line in asked)
    links = (campaign.gpu / "venv" / "lib" / "python3.12" / "site-packages" / "dks.pth").read_text()
    assert links == f"{campaign.folder}/src\n"
    command = (campaign.gpu / "venv" / "bin" / "dks-codegen").read_text()
    assert f"""'exec' "{campaign.gpu}/venv/bin/python" "$0" "$@"\n""" in command
    assert command.startswith("#!/bin/sh\n") and "dks.codegen.cli" in command
    assert campaign.run().stdout == "next: scripts/gpu_campaign.sh tests\n"
    campaign.asked()
    campaign.run("tests")
    assert campaign.asked() == ["-m pytest -q -ra tests/gpu/on_device"], "what is there is not made again"


def test_what_the_machine_lacks_comes_from_the_wheels(campaign: Campaign) -> None:
    campaign.does("gpu_campaign missing", "echo wheels/a-1-py3-none-any.whl; echo wheels/b-2-py3-none-any.whl")
    campaign.run("tests")
    (line,) = (line for line in campaign.asked() if " pip " in line)
    assert "--no-index --no-deps" in line and line.endswith(
        "wheels/a-1-py3-none-any.whl wheels/b-2-py3-none-any.whl"
    )
    campaign.does("gpu_campaign missing", "echo 'found neither installed nor in wheels/: pydantic' >&2; exit 2")
    shutil.rmtree(campaign.gpu / "venv")
    (campaign.gpu / "venv.ready").unlink()
    done = campaign.run("build")
    assert done.returncode == 2 and "nor in wheels/: pydantic" in done.stdout
    assert campaign.status()["build"] == "failed" and campaign.status()["tests"] == "done"


def test_a_sweep_that_has_not_finished_resumes_and_its_table_is_made_again(campaign: Campaign) -> None:
    campaign.does("dks-profile run", 'mkdir -p "$5"; echo "1 problems measured, 0 reused, 9 unfinished in 500 s"')
    done = campaign.run("sweep-h200-rows", LIMIT="100")
    assert done.returncode == 0 and campaign.status()["sweep-h200-rows"] == "unfinished"
    (line,) = (line for line in campaign.asked() if "dks-profile run" in line)
    assert line.endswith("run configs/h200-rows.yaml -o runs/gpu/run/h200-rows --budget 55s")
    campaign.run("codegen-h200-rows")
    asked = campaign.asked()
    assert any(line.endswith("build runs/gpu/run/h200-rows -o runs/gpu/out --name h200_rows") for line in asked)
    assert (
        "-m bench.gpu_campaign luts runs/gpu/run/h200-rows runs/gpu/out/h200_rows/lut.json runs/gpu/luts" in asked
    )
    campaign.run("bench-rows")
    assert campaign.status()["codegen-h200-rows"] == campaign.status()["bench-rows"] == "done"
    campaign.does("dks-profile run", 'echo "9 problems measured, 1 reused, 0 unfinished in 50 s"; exit 1')
    campaign.run("sweep-h200-rows")
    assert campaign.status()["sweep-h200-rows"] == "done", "1 says that some candidate failed"
    assert campaign.status()["codegen-h200-rows"] == "-"
    campaign.run("codegen-h200-rows")
    assert campaign.status()["bench-rows"] == "-"


def test_a_part_that_hangs_is_ended_and_one_that_fails_keeps_the_others(campaign: Campaign, tmp_path: Path) -> None:
    out = tmp_path / "back"
    campaign.run("sweep-gpu-smoke", OUT=str(out))
    assert {path.name for path in out.iterdir()} == {"status.txt", "last.log", "gpu.tar.gz.aa"}
    with tarfile.open(out / "gpu.tar.gz.aa") as packed:
        assert "runs/gpu/run/gpu-smoke" in packed.getnames()
    campaign.does("bench.gpu_launch", "sleep 60")
    done = campaign.run("bench-launch", LIMIT="2", OUT=str(out))
    assert done.returncode == 0 and campaign.status()["bench-launch"] == "unfinished"
    assert (campaign.gpu / "state" / "bench-launch").read_text() == "unfinished 1\n"
    campaign.does("dks-codegen build", "echo 'error: no'; exit 2")
    failed = campaign.run("codegen-gpu-smoke", OUT=str(out))
    assert failed.returncode == 2 and "error: no" in failed.stdout
    assert "error: no" in (out / "last.log").read_text()
    assert "unfinished" in (out / "status.txt").read_text()
    assert campaign.status()["sweep-gpu-smoke"] == "done" and campaign.status()["codegen-gpu-smoke"] == "failed"


def test_a_bench_without_time_for_all_its_cells_goes_on(campaign: Campaign) -> None:
    campaign.does("bench.gpu_launch", "echo 'no time for 3 of 9 cells; run it again to go on'")
    campaign.run("bench-launch", LIMIT="300")
    assert campaign.status()["bench-launch"] == "unfinished"
    assert any(line == "-m bench.gpu_launch --seconds 225" for line in campaign.asked())


def test_all_takes_what_was_tried_the_fewest_times_until_the_limit(campaign: Campaign) -> None:
    campaign.does("pytest", "exit 1")
    done = campaign.run("all", LIMIT="600", SHARE="60")
    status = campaign.status()
    assert {name for name, found in status.items() if found != "done"} == {"tests"}, done.stdout
    assert status["tests"] == "failed" and (campaign.gpu / "state" / "tests").read_text() == "failed 3\n"
    assert (campaign.gpu / "state" / "pack").read_text() == "done 1\n"
    asked = [line for line in campaign.asked() if "bench.gpu_" in line and "campaign" not in line]
    assert len(asked) == 7
    assert campaign.run().stdout == "all done or given up; see status\n"
    assert "at most" not in campaign.run("all", LIMIT="10").stdout, "there is no time to begin anything"


def test_packing_names_versions_and_refuses_too_much(campaign: Campaign) -> None:
    campaign.does("gpu_campaign manifest", 'echo "{}" >runs/gpu/manifest.json')
    campaign.run("sweep-gpu-smoke")
    results = campaign.folder / "runs" / "gpu-rows"
    results.mkdir()
    (results / "result.json").write_text("{}")
    assert campaign.run("pack").returncode == 0
    with tarfile.open(campaign.gpu / "pack.tar.gz") as packed:
        names = packed.getnames()
    assert {"runs/gpu/manifest.json", "runs/gpu/run/gpu-smoke", "runs/gpu-rows/result.json"} <= set(names)
    assert not any("venv" in name or "cache" in name for name in names)
    (campaign.gpu / "run" / "gpu-smoke" / "large").write_bytes(os.urandom(2 * 2**20))
    done = campaign.run("pack", MOST_MB="1")
    assert done.returncode == 2 and "found 3 MB, expected at most 1;" in done.stdout


def test_another_machine_looks_and_compiles_again(campaign: Campaign) -> None:
    campaign.run("doctor")
    campaign.run("build")
    campaign.run("tests")
    shutil.rmtree(campaign.gpu / "cache")
    shutil.rmtree(campaign.gpu / "venv")
    status = campaign.status()
    assert status["doctor"] == status["build"] == "-" and status["tests"] == "done"
    assert campaign.run("build").returncode == 0


def test_another_machine_goes_on_from_what_was_handed_over(campaign: Campaign, tmp_path: Path) -> None:
    large = campaign.gpu / "run" / "gpu-smoke" / "large"
    large.parent.mkdir(parents=True)
    large.write_bytes(os.urandom(16 * 2**20))
    campaign.run("sweep-gpu-smoke", OUT=str(tmp_path / "back"))
    pieces = sorted((tmp_path / "back").glob("gpu.tar.gz.*"))
    assert [piece.name[-2:] for piece in pieces] == ["aa", "ab"]
    shutil.rmtree(campaign.gpu)
    done = campaign.run("restore", *map(str, pieces))
    assert done.returncode == 0 and "sweep-gpu-smoke            done       1 runs" in done.stdout
    assert len(large.read_bytes()) == 16 * 2**20
    assert campaign.run("restore", str(tmp_path / "nothing")).returncode == 2


def test_a_part_that_is_none_is_refused(campaign: Campaign) -> None:
    done = campaign.run("sweep-x")
    assert done.returncode == 2 and done.stderr.startswith("part: found sweep-x, expected one of: doctor tests")


def test_its_configs_and_benches_are_there() -> None:
    text = (ROOT / "scripts" / "gpu_campaign.sh").read_text()

    def listed(name: str) -> list[str]:
        return text.partition(f"\n{name}=(")[2].partition(")")[0].split()

    assert all((ROOT / "configs" / f"{name}.yaml").is_file() for name in listed("SWEEPS"))
    assert all((ROOT / "bench" / f"gpu_{name}.py").is_file() for name in listed("BENCHES"))
    makefile = (ROOT / "Makefile").read_text()
    assert all(name in makefile.partition("\nbench-gpu:")[2].splitlines()[1] for name in listed("BENCHES"))


# What it asks of Python.


def test_a_run_is_packed_as_luts_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "out" / "minilm_exact" / "lut.json"
    table.parent.mkdir(parents=True)
    shutil.copy(LUTS / "minilm_exact.lut.json", table)
    rows, run = [row("torch.linear", 20.0), row("torch.addmm", 10.0)], tmp_path / "run"
    run.mkdir()
    for name, some in zip("ab", rows, strict=True):
        write_rows(run / f"{name}.parquet", [some])
    shutil.copy(LUTS / "minilm" / "_run.json", run)
    assert luts(str(run), str(table), str(tmp_path / "luts")) == 0
    made = tmp_path / "luts" / ENVIRONMENT.slug
    assert {path.name for path in (made / "minilm_exact").iterdir()} == {"minilm_exact.parquet", "_run.json"}
    assert read_run(made / "minilm_exact") == rows
    assert (made / "minilm_exact.lut.json").read_bytes() == table.read_bytes()
    assert "MB" in capsys.readouterr().out


def test_missing_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels").mkdir()
    for name in ("pydantic-2.0-x.whl", "pydantic_core-2.2-x.whl", "psutil-9-x.whl", "new_one-1-x.whl"):
        (tmp_path / "wheels" / name).touch()
    have = dict.fromkeys(gpu_campaign.NEEDED, (1, 0)) | {"pydantic": (2, 5), "nvidia-cutlass": ()}
    have |= {"pydantic_core": (2, 1), "psutil": (8, 0)}
    monkeypatch.setattr(gpu_campaign, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_campaign, "_version", lambda name: have.get(name, ()))
    assert main(["missing"]) == 2
    said = capsys.readouterr()
    assert [Path(line).name.partition("-")[0] for line in said.out.splitlines()] == ["new_one", "pydantic_core"]
    assert "found neither installed nor in wheels/: nvidia-cutlass;" in said.err
    (tmp_path / "wheels" / "nvidia_cutlass-4.2.0.0-py3-none-any.whl").touch()
    assert main(["missing"]) == 0


def test_words_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x"]) == 2 and "expected one of: missing, manifest, build, luts" in capsys.readouterr().err


def test_the_manifest_names_versions(tmp_path: Path) -> None:
    assert main(["manifest", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["packages"]["torch"] and found["commit"] and "sees no NVIDIA GPU" in str(found["environment"])
