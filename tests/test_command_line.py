"""How both commands end where their output is gone; what they say to run next."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dks.profiler.cli import main as profile
from tests.commands import run

COMMAND = """
import click
from dks.dispatch import command_line

@click.group()
def cli(): ...

@cli.command()
def say():
    click.echo("a line")

command_line.run(cli, kept="nothing is lost")
"""


@pytest.mark.parametrize("closed", [False, True])
def test_output_that_can_not_be_written(closed: bool) -> None:
    words = f"{shlex.quote(sys.executable)} -c {shlex.quote(COMMAND)} say {'>&-' if closed else '>/dev/full'}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    said = "" if closed else "error: output: No space left on device; nothing is lost\n"
    assert (done.returncode, done.stderr) == (0 if closed else 2, said)


def test_what_to_run_next_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a b é"
    folder.mkdir()
    done = run(profile, "show", folder)
    assert done.returncode == 2
    words = shlex.split(done.stderr.rpartition("run: ")[2])
    assert words == ["dks-profile", "run", "CONFIG", "-o", str(folder)]
