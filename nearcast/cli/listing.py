"""How every command prints a listing: columns for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import click

GAP = "  "
F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "", right: Collection[str] = ()
) -> None:
    """Print rows for people, one line each, never cut: a terminal wraps them, and `grep` finds whole values.

    Args:
        columns: headings; all "" = no heading.
        rows: cells as plain text. They may come from other machines, so nothing in them can steer a terminal.
        empty: what to say, and to do, when there are no rows; "" = print the heading alone.
        right: columns to align to the right.
    """
    if not rows and empty:
        click.echo(empty)
        return
    lines = [[printable(cell) for cell in row] for row in rows]
    if any(columns):
        lines.insert(0, list(columns))
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    for line in lines:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        click.echo(GAP.join(cells).rstrip())


def printable(text: str) -> str:
    """The text with everything replaced that a terminal would not show as it is."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
