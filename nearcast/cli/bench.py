"""`nearcast bench`: load one model on running nodes and print percentiles."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from nearcast.cli.listing import json_option, print_json, print_table

if TYPE_CHECKING:
    from nearcast.client import AsyncClient
    from nearcast.handler import ModelMetadata, Tensors

IN_FLIGHT_MAX = 4096
QUANTILES = (50, 95, 99)


@dataclass(slots=True)
class Outcome:
    """What the run saw. Latencies in milliseconds, of answered requests, rising once the run has ended."""

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    served_by: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def quantile_ms(self, q: float) -> float:
        """Nearest-rank quantile; 0 without answers."""
        ordered = self.latencies_ms
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


@click.command()
@click.argument("model")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("127.0.0.1:8001",),
    show_default=True,
    help="gRPC address of a node; repeatable.",
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=100.0, show_default=True, help="Per second."
)
@click.option("--duration-s", type=click.FloatRange(min=0, min_open=True, max=3600), default=5.0, show_default=True)
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), default=1000.0, show_default=True)
@json_option
def command(
    model: str, targets: Sequence[str], rate: float, duration_s: float, deadline_ms: float, as_json: bool
) -> None:
    """Send MODEL random tensors of its declared shapes at a fixed rate, and print what came back.

    An open loop: a request leaves when its time has come, answered or not, so that a slow node looks slow.
    """
    outcome = asyncio.run(_run(model, targets, rate, duration_s, deadline_ms))
    if as_json:
        print_json(report_of(outcome))
    else:
        _print_table(outcome)
    if not outcome.latencies_ms:
        raise SystemExit(1)


async def _run(model: str, targets: Sequence[str], rate: float, duration_s: float, deadline_ms: float) -> Outcome:
    from nearcast.client import AsyncClient

    async with AsyncClient(list(targets)) as client:
        inputs = make_inputs(await client.metadata(model))
        outcome = Outcome()
        open_tasks: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        for count in range(max(1, int(rate * duration_s))):
            await asyncio.sleep(max(0.0, began + count / rate - time.monotonic()))
            if len(open_tasks) >= IN_FLIGHT_MAX:
                outcome.failures["NOT_SENT"] += 1
                continue
            task = asyncio.create_task(_send(client, model, inputs, deadline_ms, outcome))
            open_tasks.add(task)
            task.add_done_callback(open_tasks.discard)
        await asyncio.gather(*open_tasks)
        outcome.seconds = time.monotonic() - began
    outcome.latencies_ms.sort()
    return outcome


async def _send(client: AsyncClient, model: str, inputs: Tensors, deadline_ms: float, outcome: Outcome) -> None:
    from nearcast.errors import MeshError

    try:
        answer = await client.infer(model, inputs, deadline_ms=deadline_ms)
    except MeshError as error:
        outcome.failures[str(error.code)] += 1
        return
    outcome.latencies_ms.append(answer.latency_ms)
    outcome.served_by[answer.served_by] += 1
    outcome.versions[answer.version] += 1


def make_inputs(metadata: ModelMetadata) -> Tensors:
    """Random tensors of the declared types; free axes become 1."""
    import numpy as np

    from nearcast.wire.tensors import dtype_of

    rng = np.random.default_rng(0)
    inputs = {}
    for spec in metadata.inputs:
        shape = tuple(1 if size < 0 else size for size in spec.shape)
        dtype = dtype_of(spec.datatype)
        inputs[spec.name] = np.full(shape, b"x", object) if dtype.hasobject else rng.integers(0, 2, shape).astype(dtype)
    return inputs


def report_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome for other programs."""
    return {
        "seconds": outcome.seconds,
        "answered": len(outcome.latencies_ms),
        **{f"p{q}_ms": outcome.quantile_ms(q / 100) for q in QUANTILES},
        "served_by": outcome.served_by,
        "versions": outcome.versions,
        "failures": outcome.failures,
    }


def _print_table(outcome: Outcome) -> None:
    answered, failed = len(outcome.latencies_ms), sum(outcome.failures.values())
    rows = [
        ["answered", f"{answered} ({answered / outcome.seconds:.1f}/s)"],
        ["failed", ", ".join(f"{code} {n}" for code, n in outcome.failures.most_common()) if failed else "0"],
        *([f"p{q}", f"{outcome.quantile_ms(q / 100):.2f} ms"] for q in QUANTILES),
        ["served by", ", ".join(f"{node} {n}" for node, n in outcome.served_by.most_common())],
        ["versions", ", ".join(f"{version} {n}" for version, n in outcome.versions.most_common())],
    ]
    print_table(["", ""], rows)
