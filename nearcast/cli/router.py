"""`nearcast router`: a stand-alone router."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nearcast.cli.process_options import join_option, quick_start, settings_options


@click.command()
@settings_options
@join_option
def command(path: Path | None, token: str, overrides: tuple[str, ...]) -> None:
    """Run a stand-alone router: it holds no models and sends each request to the node that can answer in time.

    It finds nodes in the directory of the mesh that it joined, or in [[targets]] of its configuration.
    When it is ready it prints one JSON line with its addresses. SIGHUP has it read its configuration again.
    """
    with quick_start():
        from router.__main__ import run_router

        code = run_router(config=path, overrides=overrides, token=token)
    sys.exit(code)
