"""What both commands share: how they end, and how they print a table. Needs click and rich."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

from dks.dispatch.errors import BadInput, unreadable


def run(command: click.Group, kept: str) -> NoReturn:
    """Run ``command`` and exit: 0 done, 1 as it says, 2 after one message for bad input, 130 interrupted.

    Args:
        kept: what an interruption or a full disk leaves, for the message.
    """
    try:
        code = command.main(standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk may show only now
        sys.exit(code)
    except BadInput as error:
        click.echo(f"error: {error}", err=True)
    except click.ClickException as error:
        error.show()
    except click.Abort:
        click.echo(f"interrupted: {kept}", err=True)
        sys.exit(130)
    except OSError as error:
        if isinstance(error, PermissionError) and isinstance(error.filename, (str, Path)):
            click.echo(f"error: {unreadable(error.filename, error)}; {kept}", err=True)
        else:
            click.echo(f"error: {error.filename or 'output'}: {error.strerror}; {kept}", err=True)
    _drop_output()
    sys.exit(2)


def _drop_output() -> None:
    """What is left of the output goes nowhere: Python would try again at its end, and exit with 120."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def print_table(table: Table) -> None:
    """To a terminal as wide as it is, elsewhere wide enough that nothing is cut."""
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
