"""More than everybody can serve: what is still answered, who is spared, and whether a jam dissolves. Virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.rows import Row
from simulations.experiment import LIVE, Run
from simulations.replicate import replicate
from simulations.report import recovery_s
from simulations.scenario import Fault, NodeSpec, Phase, RequestClass, Scenario

NODES = (
    NodeSpec(name="edge", tier="local", rtt_ms=0.2, service_ms=20.0),
    NodeSpec(name="pop", tier="peer", rtt_ms=8.0, service_ms=20.0),
    NodeSpec(name="cloud", tier="cloud", rtt_ms=60.0, service_ms=12.0),
)
CAPACITY_RPS = sum(node.slots / node.service_mean_s for node in NODES)
DEADLINE_MS = 250.0
"""A stalled run (150 ms) on an idle node is still in time; a queue of ten is not."""
RETRIES = 3
TOP_SHARE = 0.15
"""Of the capacity; the bar allows the top class a fifth of it."""
LOW_SHARE = 0.5
"""Of the other requests."""
STEADY_S = 30.0
COUNTED_S = (5.0, STEADY_S - 1.0)
TRIGGER_AT_S, TRIGGER_S, AFTER_S = 10.0, 4.0, 16.0
NORMAL_LOAD = 0.7
SEEDS, SEEDS_QUICK = tuple(range(201, 206)), (201,)
TRIGGER_SEEDS, TRIGGER_SEEDS_QUICK = tuple(range(301, 351)), tuple(range(301, 305))
COMPARED, COMPARED_SEEDS = "p2c-least-request", 5
"""For scale only, and so with fewer seeds: it admits everything."""
NORMAL_MARGIN = 0.01


def overload(factor: float) -> Scenario:
    """A constant load of `factor` times the capacity; users without an answer ask again."""
    return Scenario(
        name=f"overload-{factor:g}x",
        title=f"{factor:g} times the capacity",
        why="The top class takes 15 % of the capacity, the rest is half ordinary and half batch.",
        duration_s=STEADY_S,
        warmup_s=0.0,
        slo_ms=DEADLINE_MS,
        deadline_ms=DEADLINE_MS,
        retries=RETRIES,
        nodes=NODES,
        load=(Phase(rate_rps=factor * CAPACITY_RPS),),
        classes=classes(TOP_SHARE / factor),
    )


def trigger(kind: str) -> Scenario:
    """70 % load; for some seconds four times as many users, or nodes three times slower. Either jams every queue."""
    ends_s = TRIGGER_AT_S + TRIGGER_S
    window = ((TRIGGER_AT_S, ends_s),)
    normal, load = Phase(rate_rps=NORMAL_LOAD * CAPACITY_RPS), 4.0 if kind == "crowd" else 1.0
    slow = Fault(kind="slow", nodes=tuple(node.name for node in NODES), value=3.0, windows_s=window)
    idle = Fault(kind="slow", nodes=(), value=1.0, windows_s=window)
    return Scenario(
        name=f"trigger-{kind}",
        title="A trigger of four seconds",
        why="At 70 % load a jam dissolves by itself, unless retries of those who wait keep it alive.",
        duration_s=ends_s + AFTER_S,
        slo_ms=DEADLINE_MS,
        deadline_ms=DEADLINE_MS,
        retries=RETRIES,
        nodes=NODES,
        load=(
            normal,
            Phase(from_s=TRIGGER_AT_S, rate_rps=load * normal.rate_rps),
            Phase(from_s=ends_s, rate_rps=normal.rate_rps),
        ),
        classes=classes(TOP_SHARE),
        faults=(idle if kind == "crowd" else slow,),
    )


def classes(top: float) -> tuple[RequestClass, ...]:
    """Top, ordinary, batch."""
    rest = 1.0 - top
    return (
        RequestClass(share=top, priority=1),
        RequestClass(share=rest * (1.0 - LOW_SHARE)),
        RequestClass(share=rest * LOW_SHARE, priority=2, tenant="batch"),
    )


def run(*, quick: bool) -> list[Row]:
    """Goodput and the top class at 1.5 and 3 times the capacity; recovery after a trigger, seed by seed."""
    rows: list[Row] = []
    seeds = SEEDS_QUICK if quick else SEEDS
    for factor in (1.5, 3.0):
        scenario = overload(factor)
        live = steady(replicate([scenario], (LIVE,), seeds, progress=_progress(scenario.name))[scenario.name, LIVE])
        other = steady(replicate([scenario], (COMPARED,), seeds[:1])[scenario.name, COMPARED])
        note = f"{COMPARED}: goodput {other[0]:.2f}, top class {other[1]:.1%}"
        name = f"{factor:g}x".replace(".", "_")
        rows += [
            Row(f"overload.goodput_{name}", live[0], "x", f"of {CAPACITY_RPS:.0f} rps; {note}"),
            Row(f"overload.top_class_in_time_{name}", live[1], "", "at the first try; 15 % of the capacity"),
            Row(f"overload.ordinary_answered_{name}", live[2], "", f"{COMPARED}: {other[2]:.1%}"),
            Row(f"overload.batch_answered_{name}", live[3], "", f"{COMPARED}: {other[3]:.1%}"),
        ]
    return rows + recoveries(TRIGGER_SEEDS_QUICK if quick else TRIGGER_SEEDS)


def steady(runs: Sequence[Run]) -> tuple[float, float, float, float]:
    """Answers over capacity, the share of the top class in time, and of the others those answered after any try.

    Answers count whenever their users came: who came early and asks again uses the capacity of the counted time, too.
    """
    begin_s, end_s = COUNTED_S
    answered_s = np.concatenate([each.at_s + each.latency_s for each in runs])
    answered = int(((answered_s >= begin_s) & (answered_s < end_s)).sum())
    latency_ms = {
        rank: np.concatenate([e.latency_s[(e.priority == rank) & (e.at_s >= begin_s)] for e in runs]) * 1e3
        for rank in (1, 0, 2)
    }
    in_time = float(np.mean(latency_ms[1] <= DEADLINE_MS))
    ordinary, batch = (float(np.mean(np.isfinite(latency_ms[rank]))) for rank in (0, 2))
    return answered / len(runs) / (end_s - begin_s) / CAPACITY_RPS, in_time, ordinary, batch


def recoveries(seeds: Sequence[int]) -> list[Row]:
    """How many seeds are back to normal within twice the trigger, each seed with both kinds of trigger."""
    late: dict[str, set[int]] = {LIVE: set(), COMPARED: set()}
    slowest_s = 0.0
    for scenario in (trigger("crowd"), trigger("slow")):
        for policy, some in ((LIVE, seeds), (COMPARED, seeds[:COMPARED_SEEDS])):
            found = replicate([scenario], (policy,), some, progress=_progress(f"{scenario.name} {policy}"))
            took_s = {each.seed: back_to_normal_s(scenario, each) for each in found[scenario.name, policy]}
            late[policy] |= {seed for seed, after_s in took_s.items() if after_s > 2.0 * TRIGGER_S}
            slowest_s = max(slowest_s, *took_s.values()) if policy == LIVE else slowest_s
    compared = min(len(seeds), COMPARED_SEEDS)
    note = f"of {len(seeds)} within {2 * TRIGGER_S:g} s; {COMPARED}: {compared - len(late[COMPARED])} of {compared}"
    return [
        Row("overload.recovered_seeds", len(seeds) - len(late[LIVE]), "seeds", note),
        Row("overload.recovery_slowest_s", slowest_s, "s", f"after a trigger of {TRIGGER_S:g} s"),
    ]


def back_to_normal_s(scenario: Scenario, run: Run) -> float:
    """Seconds from the end of the trigger until all is as before; infinite if it does not last."""
    ends_s = TRIGGER_AT_S + TRIGGER_S
    met = run.latency_s * 1e3 <= DEADLINE_MS
    normal = float(np.mean(met[run.at_s < TRIGGER_AT_S]))
    late = run.at_s >= ends_s + 2.0 * TRIGGER_S
    if float(np.mean(met[late])) < normal - NORMAL_MARGIN:
        return float("inf")
    return recovery_s([run], scenario, ends_s)


def _progress(name: str) -> Callable[[int, int], None]:
    def tell(done: int, every: int) -> None:
        sys.stderr.write(f"\r{name}: {done}/{every}" + ("\n" if done == every else ""))
        sys.stderr.flush()

    return tell
