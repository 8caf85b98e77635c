"""One scenario twice: with real processes, and in the simulator with a fleet calibrated from what those nodes measured.

Both draw the same arrivals and the same model time for each request on each node. A first live run, of another seed,
tells the simulator what the machine adds: to a model run by the nodes' own clocks, to the way by what is left of a
latency without queue and model.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.live_mesh import Answer, LiveMesh, drive
from benchmarks.rows import Row
from simulations.experiment import LIVE
from simulations.experiment import run as simulate
from simulations.scenario import NodeSpec, Phase, Scenario
from simulations.workload import draw_workload

SECONDS, SECONDS_QUICK = 45.0, 10.0
CALIBRATION_SEED = 99
SEEDS = (1, 2, 3)


def make_scenario(seconds: float) -> Scenario:
    """Two near nodes and a far one with more and faster slots; six tenths of what they can do together."""
    stalls = {"stall_share": 0.01, "stall_ms": 150.0, "queue_max": 64}
    return Scenario(
        name="live",
        title="A small mesh",
        why="model times far above what a busy machine adds to them",
        duration_s=seconds,
        warmup_s=2.0,
        deadline_ms=1000.0,
        nodes=(
            NodeSpec(name="near-a", tier="peer", slots=2, rtt_ms=6.0, service_ms=50.0, **stalls),  # type: ignore[arg-type]
            NodeSpec(name="near-b", tier="peer", slots=1, rtt_ms=10.0, service_ms=40.0, **stalls),  # type: ignore[arg-type]
            NodeSpec(name="far", tier="cloud", slots=4, rtt_ms=40.0, service_ms=60.0, **stalls),  # type: ignore[arg-type]
        ),
        load=(Phase(rate_rps=75.0),),
    )


def run(*, quick: bool) -> list[Row]:
    """Latencies of the same requests, live and simulated."""
    nominal = make_scenario(SECONDS_QUICK if quick else SECONDS)
    fleet = calibrate(nominal, CALIBRATION_SEED, run_live(nominal, CALIBRATION_SEED))
    rows: list[Row] = []
    apart: dict[str, list[float]] = defaultdict(list)
    for seed in SEEDS[:1] if quick else SEEDS:
        answers = [answer for answer in run_live(nominal, seed) if answer.at_s >= nominal.warmup_s]
        simulated = simulate(fleet, LIVE, seed)
        first = Counter(name for at, name, kind in simulated.sends if kind == "first" and at >= nominal.warmup_s)
        live = [answer.latency_s * 1e3 for answer in answers]
        shares = _shares(Counter(answer.served.node for answer in answers)), _shares(first)
        for name, q in (("p50", 0.5), ("p99", 0.99)):
            real, virtual = float(np.quantile(live, q)), float(np.quantile(simulated.latency_s * 1e3, q))
            apart[name].append(abs(real / virtual - 1.0))
            rows += [Row(f"live.{name}_ms_{seed}", real, "ms"), Row(f"live.simulated_{name}_ms_{seed}", virtual, "ms")]
        rows.append(Row(f"live.requests_{seed}", len(answers), "1", f"live {shares[0]}; simulated {shares[1]}"))
        failed = Counter(answer.code for answer in answers if answer.code)
        rows.append(Row(f"live.failed_{seed}", failed.total(), "1", ", ".join(f"{n} {c}" for c, n in failed.items())))
    added = ", ".join(
        f"{node.name}: model {node.service_ms - plain.service_ms:+.2f} ms, way {node.rtt_ms - plain.rtt_ms:+.2f} ms"
        for node, plain in zip(fleet.nodes, nominal.nodes, strict=True)
    )
    return [
        *rows,
        Row("live.p50_apart", statistics.median(apart["p50"]), "share", f"median over seeds; the machine adds {added}"),
        Row("live.p99_apart", statistics.median(apart["p99"]), "share"),
    ]


def run_live(scenario: Scenario, seed: int) -> list[Answer]:
    """All answers of one run with real processes."""
    with tempfile.TemporaryDirectory() as folder, LiveMesh(Path(folder), scenario, seed) as mesh:
        return asyncio.run(drive(mesh.router["grpc"], scenario, seed))


def calibrate(scenario: Scenario, seed: int, answers: Sequence[Answer]) -> Scenario:
    """The scenario with the model times and the ways that were measured.

    Raises:
        RuntimeError: if a node has answered nothing.
    """
    luck = draw_workload(scenario, seed).luck
    nodes = []
    for node in scenario.nodes:
        mine = [answer for answer in answers if answer.served.node == node.name]
        if not mine:
            raise RuntimeError(f"{node.name} has answered nothing; nothing is known about it")
        drawn = luck[node.name]
        added_s = [a.served.compute_us / 1e6 - drawn.work_s[a.number] - drawn.stall_s[a.number] for a in mine]
        ways_ms = [a.latency_s * 1e3 - (a.served.queue_us + a.served.compute_us) / 1e3 for a in mine]
        # A request that was hedged or sent again has waited elsewhere before: the median does not see it.
        way_ms, least_ms = statistics.median(ways_ms), float(np.quantile(ways_ms, 0.1))
        nodes.append(
            msgspec.structs.replace(
                node,
                service_ms=node.service_ms + statistics.median(added_s) * 1e3,
                rtt_ms=least_ms,
                rtt_jitter=(way_ms - least_ms) / least_ms / 0.69,
            )
        )
    return msgspec.structs.replace(scenario, nodes=tuple(nodes))


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    return ", ".join(f"{name or 'nobody'} {count / total:.0%}" for name, count in sorted(counts.items()))
