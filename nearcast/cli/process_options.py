"""What the commands that run a process share: where its settings come from, and how a node joins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(function: F) -> F:
    """Add `--config` and `--set`; `nearcast config show` lists what can be set."""
    path = click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file.")
    override = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable."
    )
    return path(override(function))


def join_option(function: F) -> F:
    """Add `--join`."""
    return click.option(
        "--join",
        "token",
        default="",
        metavar="TOKEN",
        help="Join the mesh once, with a token from `nearcast nodes invite`: @FILE that holds it, - to read it from"
        " standard input, or the token itself, which other users of this machine then see in the list of processes.",
    )(function)
