"""The order of the scenes, and what happens before the first and after the last."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console

from nearcast.cli.demo import asking, fallback, operating, publishing, refusing, table
from nearcast.cli.demo.stage import Stage
from nearcast.cli.processes import Mesh
from nearcast.errors import MeshError
from nearcast.runtime import ExitCode, Shutdown
from nearcast.runtime import run as run_process

EDGES, CLOUDS, ROUTERS = 2, 1, 1


def run(*, once: bool, data_dir: Path | None) -> int:
    """Play the demo; returns the exit code."""

    async def main(shutdown: Shutdown) -> int:
        folder = data_dir or Path(tempfile.mkdtemp(prefix="nearcast-demo-"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return await play(Console(highlight=False), folder, shutdown, once=once)
        finally:
            if data_dir is None:
                shutil.rmtree(folder, ignore_errors=True)

    return run_process(main)


async def play(console: Console, folder: Path, shutdown: Shutdown, *, once: bool) -> int:
    """All scenes in order. A check that fails is shown and counted; a scene that cannot go on ends the demo."""
    began = time.monotonic()
    console.print(
        "[bold]1. The mesh starts[/]: broker, sync, a cloud core, two edge nodes, a router; each joins with a token"
    )
    mesh = await Mesh.start(folder / "mesh", edges=EDGES, cloud=CLOUDS, router=ROUTERS)
    stage = Stage(console, mesh, folder)
    try:
        publishing.show_processes(stage)
        for scene in (publishing.play, asking.play, fallback.play, operating.play, refusing.play):
            if shutdown.requested:
                return ExitCode.OK
            await scene(stage)
        await table.show(stage, live=not once)
        passed = sum(check.ok for check in stage.checks)
        console.print(f"\n[bold]{passed} of {len(stage.checks)} checks held[/] in {time.monotonic() - began:.1f} s")
        if not once:
            await table.stay(stage, shutdown)
    except MeshError as error:
        stage.check("the demo plays to its end", ok=False, detail=error.message)
    finally:
        await mesh.stop()
    failed = [check for check in stage.checks if not check.ok]
    for check in failed:
        console.print(f"[red]failed:[/] {check.name} {check.detail}")
    return ExitCode.FAILED if failed else ExitCode.OK
