"""`python -m benchmarks.serving_table [FILE]` prints the last full run of `benchmarks serving` as Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.serving import OWN, RESULTS, Measured, best
from benchmarks.serving_load import Load
from benchmarks.serving_peers import Loop

SERVERS = (OWN, "grpc.aio", "MLServer", "Triton")
TRANSPORTS = {"grpc": "gRPC", "rest": "REST"}


def read(path: Path) -> list[Measured]:
    """The measurements of a file of raw results."""
    fields = Load.__dataclass_fields__
    return [
        Measured(
            loop=Loop(**entry.pop("loop")),
            load=Load(**{name: value for name, value in entry.items() if name in fields}),
            **{name: value for name, value in entry.items() if name not in fields},
        )
        for entry in json.loads(path.read_text())["measured"]
    ]


def table(measured: list[Measured]) -> str:
    """One row for each model, transport and load; of each server its best setting: requests per second (p99 in ms)."""
    found = {(e.model, e.transport, e.concurrency, e.server): e for e in best(measured)}
    rows = dict.fromkeys((e.model, e.transport, e.concurrency) for e in measured)
    lines = [f"| model | in flight | engine alone | {' | '.join(SERVERS)} |", "|---|---|---|" + "---|" * len(SERVERS)]
    for model, transport, concurrency in rows:
        cells = []
        for server in SERVERS:
            each = found.get((model, transport, concurrency, server))
            cells.append("" if each is None else f"{each.load.requests_per_s:,.0f} ({each.load.p99_us / 1e3:.2f} ms)")
        own = found.get((model, transport, concurrency, OWN))
        alone = "" if own is None else f"{1e6 / own.loop.loop_us:,.0f}"
        lines.append(f"| {model}, {TRANSPORTS[transport]} | {concurrency} | {alone} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "serving-raw.full.json"
    print(table(read(path)))


if __name__ == "__main__":
    main()
