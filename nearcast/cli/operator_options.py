"""What the commands of an operator share: where the keys are, where the controller is, and how a listing is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _default_home() -> Path:
    from model_sync.home import default_home

    return default_home()


def home_option(function: F) -> F:
    """Add `--home`."""
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=_default_home,
        help="Folder with operator/ (and sync/). Default: $NEARCAST_HOME, else ~/.nearcast.",
    )(function)


def operator_options(function: F) -> F:
    """Add `--home` and `--control`."""
    control = click.option("--control", default="", metavar="URL", help="Controller; default: what --home names.")
    return home_option(control(function))


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows for people; `empty` says what to do when there are none."""
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
