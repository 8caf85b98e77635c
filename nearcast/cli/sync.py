"""`nearcast sync`: the controller of a mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nearcast.cli.process_options import settings_options


@click.command()
@click.option("--home", type=click.Path(path_type=Path, file_okay=False), help="Folder sync/ of `nearcast keys init`.")
@settings_options
def command(home: Path | None, path: Path | None, overrides: tuple[str, ...]) -> None:
    """Run the controller: repository, rollouts, enrolment and node directory behind one HTTPS listener.

    It prints one JSON line with its address when it is ready.
    """
    from model_sync.controller.app import load_sync_config, run_sync

    sys.exit(run_sync(load_sync_config(path, overrides, home=home)))
