"""Scene 7: who answered what, how fast; then addresses to try by hand until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearcast.cli.demo.samples import load_digits
from nearcast.cli.demo.stage import Observation, Stage
from nearcast.client import AsyncClient
from nearcast.errors import MeshError

if TYPE_CHECKING:
    from rich.table import Table

    from nearcast.runtime import Shutdown

REFRESH_S = 0.5
GENTLE_REQUESTS = 20
SHOWN_DIGIT = 7


def make_table(observations: list[Observation]) -> Table:
    """One row per (model, version, client's way in, node that answered)."""
    from rich.table import Table

    groups: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for seen in observations:
        groups[seen.model, seen.version, seen.client, seen.served_by].append(seen.latency_ms)
    table = Table(title="requests of the demo's clients: nearcast knows both edges, grpc.aio the router")
    for column in ("model", "version", "client", "served by"):
        table.add_column(column, no_wrap=True)
    for column in ("count", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for key, latencies in sorted(groups.items()):
        ordered = sorted(latencies)
        p50, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99))
        table.add_row(*key, str(len(ordered)), f"{p50:.1f}", f"{p99:.1f}")
    return table


async def ask_gently(stage: Stage, client: AsyncClient) -> None:
    """One request to each model kind that needs no state; failures are shown as rows of their own."""
    for model in ("digits", "digits_large"):
        try:
            answer = await client.infer(model, {"image": load_digits().images}, deadline_ms=1000)
        except MeshError as error:
            stage.note(
                Observation(model=model, version=str(error.code), client="nearcast", served_by="-", latency_ms=0.0)
            )
            continue
        stage.note(
            Observation(
                model=model,
                version=answer.version,
                client="nearcast",
                served_by=answer.served_by,
                latency_ms=answer.latency_ms,
            )
        )


async def show(stage: Stage, *, live: bool) -> None:
    """Ask a little more, so that the table has rows of the last state; print it unless it follows live."""
    stage.title(7, "Who answered")
    async with AsyncClient(stage.edge_addresses()) as client:
        for _ in range(GENTLE_REQUESTS):
            await ask_gently(stage, client)
    if not live:
        stage.console.print(make_table(stage.observations))


async def stay(stage: Stage, shutdown: Shutdown) -> None:
    """Keep the table live and the addresses in sight until Ctrl-C."""
    from rich.live import Live

    show_addresses(stage)
    async with AsyncClient(stage.edge_addresses()) as client:
        with Live(make_table(stage.observations), console=stage.console, refresh_per_second=2) as live:
            while not shutdown.requested:
                await ask_gently(stage, client)
                live.update(make_table(stage.observations))
                try:
                    async with asyncio.timeout(REFRESH_S):
                        await shutdown.wait()
                except TimeoutError:
                    continue
    stage.console.print("draining…")


def show_addresses(stage: Stage) -> None:
    """What to type in another terminal; the image in the file is a seven."""
    edge, router = stage.mesh.addresses["edge-1"], stage.mesh.addresses["router-1"]
    host, port = edge["mqtt"].rsplit(":", 1)
    image = load_digits().images[SHOWN_DIGIT][None, :]
    array, body = stage.folder / "seven.npy", stage.folder / "seven.json"
    np.save(array, image)
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.ravel().tolist()}
    body.write_text(json.dumps({"inputs": [tensor]}))
    python = f"Client(['{router['grpc']}']).infer('digits', {{'image': numpy.load('{array}')}})"
    commands = {
        "HTTP": f"curl -s http://{edge['http']}/v2/models/digits/infer -d @{body}",
        "gRPC": f"nearcast infer digits image=@{array} --url grpc://{router['grpc']}",
        "MQTT": f"mosquitto_rr -V 5 -h {host} -p {port} -t nc/v1/local/me/up/infer/digits "
        f'-e nc/v1/local/me/down/reply/digits -D publish content-type application/json -m "$(cat {body})"',
        "Python": f'python -c "import numpy; from nearcast.client import Client; print({python})"',
        "nodes": f"NEARCAST_HOME={stage.mesh.operator_home} nearcast nodes list",
        "route": f"nearcast route explain digits --address http://{edge['metrics']}",
    }
    stage.console.print(
        f"\n[bold]Try it by hand[/] (first: export PATH={Path(sys.executable).parent}:$PATH); Ctrl-C ends"
    )
    for name, line in commands.items():
        stage.console.print(f"[cyan]{name}[/]", line, soft_wrap=True)
