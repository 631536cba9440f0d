"""Users without a name or a home, folders of others, volumes that can only be read: it works, or one message says
what such a user can do. The commands run in processes of such users."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dks.codegen.cli import main as codegen
from dks.dispatch import trust
from dks.profiler.cli import main as profile
from tests.commands import run
from tests.volumes import as_a_volume

ROOT = Path(__file__).parent.parent
UID = 54321
CONFIG = """
version: 1
name: small
threads: 1
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32}}
    candidates: ["torch.*"]
measure: {seconds: 0.02, min_rounds: 6, max_rounds: 6, processes: 2}
"""
COMMANDS = """
    import json, os, sys, warnings
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from dks.codegen.cli import main as codegen
    from dks.dispatch.tiles import build
    from dks.profiler.cli import main as profile
    from tests.commands import run
    said = {{}}
    def step(name, main, *words):
        done = run(main, *words)
        said[name] = [done.returncode, done.stdout, done.stderr]
"""


def words_as(uid: int) -> list[str]:
    """How Python is run by another user. Where it lies in a closed folder, as root's own Python does, that user may
    read everything; files are as closed to writing as ever."""
    plain = [sys.executable]
    with contextlib.suppress(OSError):
        subprocess.run([*plain, "-c", ""], user=uid, group=uid, extra_groups=[], check=True, cwd="/")
        return plain
    able = "-all,+dac_read_search"
    drop = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", f"--inh-caps={able}", f"--ambient-caps={able}"]
    return ["setpriv", *drop, *plain]


@pytest.fixture(scope="module")
def python() -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    try:
        words = words_as(UID)
        done = subprocess.run([*words, "-c", "import torch"], capture_output=True, text=True, check=False, cwd="/")
    except OSError as error:
        pytest.skip(f"no Python for another user: {error}")
    if done.returncode:
        pytest.skip(f"no Python for another user: {done.stderr[-200:]}")
    return words


def run_as(python: list[str], script: str, env: Mapping[str, str], umask: int, cwd: Path = Path("/")) -> Any:
    """What ``script`` puts into ``said``, run by a user with neither name nor home, but for what ``env`` says."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    text = (
        textwrap.dedent(COMMANDS.format(root=str(ROOT)))
        + textwrap.dedent(script)
        + "\nprint('SAID', json.dumps(said))"
    )
    who = {} if python[0] == "setpriv" else {"user": UID, "group": UID, "extra_groups": []}
    done = subprocess.run(
        [*python, "-c", text],
        env={**kept, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", **env},
        umask=umask,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        **who,  # type: ignore[call-overload]
    )
    assert done.returncode == 0 and "SAID " in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("SAID ")[2])


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that everybody reaches, as /tmp is, with a config; and one in it that belongs to the user."""
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="dks-accounts-", dir="/tmp"))
    place.chmod(0o755)
    (place / "small.yaml").write_text(CONFIG)
    (place / "own").mkdir()
    os.chown(place / "own", UID, UID)
    (place / "own").chmod(0o755)
    yield place
    shutil.rmtree(place)


def no_traceback(said: Mapping[str, Any]) -> None:
    for name, (_, out, err) in said.items():
        assert "Traceback" not in out + err, (name, err)


def test_a_user_without_name_or_home_measures_builds_and_serves(python: list[str], place: Path) -> None:
    script = f"""
    place = Path({str(place)!r})
    step("doctor", profile, "doctor")
    step("run", profile, "run", place / "small.yaml", "-o", place / "own/run")
    step("show", profile, "show", place / "own/run")
    step("build", codegen, "build", place / "own/run", "-o", place / "own/out", "--name", "mine")
    step("check", codegen, "check", place / "own/out")
    step("explain", codegen, "explain", place / "own/out", "linear", "m=4", "n=32", "k=32")
    sys.path.insert(0, str(place / "own/out"))
    import mine, torch
    layer = mine.prepare_linear(torch.ones(32, 32), None)
    said["served"] = [0, str(float(layer(torch.ones(4, 32)).sum())), mine.stats()["table"]]
    """
    said = run_as(python, script, {"TMPDIR": str(place / "own"), "OMP_NUM_THREADS": "1"}, 0o077)
    no_traceback(said)
    codes = {name: code for name, (code, _, _) in said.items()}
    assert codes == dict.fromkeys(said, 0), said
    assert f"kept in {place / 'own' / f'dks-{UID}'}" in said["doctor"][1]
    assert "torch.linear" in said["show"][1] and said["served"][1:] == [str(4.0 * 32 * 32), "serving"]
    for path in [place / "own" / "run", *(place / "own" / "run").iterdir(), *(place / "own" / "out").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, f"{path}: the umask closes it"


@pytest.mark.parametrize(
    ("env", "kept"),
    [({}, "/tmp/dks-54321"), ({"HOME": "/"}, "/tmp/dks-54321"), ({"HOME": "/root"}, "/tmp/dks-54321"),
     ({"HOME": "{own}"}, "{own}/.cache/dks"), ({"DKS_CACHE": "{own}/c"}, "{own}/c")],
)  # fmt: skip
def test_the_cache_is_where_the_user_can_keep_it(
    python: list[str], place: Path, env: dict[str, str], kept: str
) -> None:
    own = str(place / "own")
    script = """
    said["cache"] = str(build.cache())
    said["closed"] = build.closed()
    said["mode"] = oct(build.cache().stat().st_mode & 0o777)
    """
    said = run_as(python, script, {name: text.format(own=own) for name, text in env.items()}, 0o002)
    assert said == {"cache": kept.format(own=own), "closed": "", "mode": "0o755"}
    if kept.startswith("/tmp/dks-"):
        shutil.rmtree(kept)


def test_a_cache_that_can_not_be_kept_has_one_message(python: list[str], place: Path) -> None:
    script = """
    said["closed"] = build.closed()
    from dks.dispatch.native import build as native
    said["native"] = native.cached()[1]
    step("doctor", profile, "doctor")
    """
    said = run_as(python, script, {"DKS_CACHE": str(place / "cache")}, 0o022)
    assert said["doctor"][0] == 0 and said["closed"] in said["doctor"][1]
    assert str(place / "cache") in said["closed"] and "set DKS_CACHE to a folder that can" in said["closed"]
    assert str(place / "cache") in said["native"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_what_another_user_may_not_read_is_said_so_with_a_remedy(place: Path) -> None:
    """Forked, since this Python itself may be closed to others."""
    (place / "run").mkdir(mode=0o755)
    (place / "run" / "linear.parquet").write_bytes(b"PAR1")
    (place / "run" / "linear.parquet").chmod(0o600)
    (place / "closed").mkdir(mode=0o700)
    commands: dict[str, tuple[Callable[[], None], Sequence[object]]] = {
        "file": (profile, ("show", place / "run")),
        "build": (codegen, ("build", place / "run", "-o", place / "own/out", "--name", "mine")),
        "folder": (profile, ("show", place / "closed")),
        "check": (codegen, ("check", place / "closed/out")),
    }

    def child(answer: Any) -> None:
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)
        answer.send({name: run(main, *words) for name, (main, words) in commands.items()})

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60)
    for name, done in ours.recv().items():
        assert done.returncode == 2 and "Traceback" not in done.stderr, (name, done)
        assert "Permission denied" in done.stderr and "chmod -R go+rX" in done.stderr, (name, done)
    process.join()


def test_a_package_of_root_in_a_volume_is_read_by_another_user(python: list[str], place: Path) -> None:
    """Nothing there may be written by who serves it; then one of its links leads where others may write."""
    from dks.codegen.package import build
    from dks.codegen.policy import Policy
    from dks.codegen.select import select
    from tests.codegen.test_package import here, made_rows

    rows = here(made_rows())
    before = os.umask(0o022)
    try:
        folder = build(select(rows, Policy(max_error=1e-5)), rows, place / "out", "theirs").folder
    finally:
        os.umask(before)
    as_a_volume(folder)
    assert trust.strangers(folder) == []
    script = f"""
    place = Path({str(place)!r})
    step("check", codegen, "check", place / "out")
    step("explain", codegen, "explain", place / "out", "linear", "m=4", "n=64", "k=32")
    step("again", codegen, "build", place / "run", "-o", place / "out", "--name", "theirs")
    import torch
    torch.set_num_threads({__import__("torch").get_num_threads()})
    sys.path.insert(0, str(place / "out"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import theirs
    said["import"] = [0, theirs.stats()["table"], " ".join(str(each.message) for each in caught)]
    """
    said = run_as(python, script, {"HOME": "/"}, 0o077)
    no_traceback(said)
    assert said["import"][1] == "serving", said
    assert said["check"][0] == 0 and "whole" in said["check"][1], said
    assert said["explain"][0] == 0 and said["again"][0] == 2
