"""What the commands of an operator share: where the keys are, where the controller is, and which channel is meant."""

from __future__ import annotations

from collections.abc import Callable
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


def channel_option(function: F) -> F:
    """Add `--channel`."""
    return click.option(
        "--channel",
        default="stable",
        show_default=True,
        help="Which channel; edge nodes follow `stable`, cloud cores `cloud`.",
    )(function)


def reason_option(function: F) -> F:
    """Add `--reason`."""
    return click.option("--reason", default="", help="Why; signed into the channel document for all to read.")(function)
