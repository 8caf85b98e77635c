"""What the commands that run a process share: where its settings come from, how a node joins, a quick start."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
SPARED_PACKAGES = ("rich", "better_exceptions", "greenlet", "typing_extensions")
"""What structlog and msgspec import where it is installed: for coloured tracebacks and greenlets, which our processes
have not, and types of older interpreters."""


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


@contextmanager
def quick_start() -> Iterator[None]:
    """For the imports and the start of a long-lived process, about a fifth quicker.

    Until the process is ready nobody looks for garbage: a start makes half a million objects, and hardly any goes.
    """
    gc.disable()
    # Ours are small, or a model's engine makes them; numpy would start a thread for every core, which spins at first.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    spared = [name for name in SPARED_PACKAGES if name not in sys.modules]
    for name in spared:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import msgspec  # noqa: F401
        import structlog  # noqa: F401
    finally:
        for name in spared:
            del sys.modules[name]
    try:
        yield
    finally:
        gc.enable()
