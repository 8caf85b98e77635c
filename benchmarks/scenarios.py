"""The live policy in twelve scenarios, beside six published balancers and two oracles. Virtual time, judged seeds.

Tables of every policy in every scenario go to `results/scenarios.KIND.md`.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.rows import Row
from simulations.experiment import LIVE, Run, baselines, policy_names
from simulations.replicate import replicate, stream_runs
from simulations.report import Summary, recovery_s, send_share, summarize
from simulations.scenario import JUDGED_SEEDS, Scenario, load_scenario, scenario_names

BROWNOUT, SINKHOLE, STALE = "cloud-brownout", "sinkhole", "stale-reports"
CLEARLY_BELOW = 0.7
"""The bar for a win: 30 % below the best baseline."""
NOTICED_S = 1.0
RESULTS = Path(__file__).parent / "results"
Tables = dict[str, dict[str, Summary]]


def run(*, quick: bool) -> list[Row]:
    """Every policy in every scenario, over the judged seeds; `quick` takes one of them and no full oracle."""
    seeds = JUDGED_SEEDS[:1] if quick else JUDGED_SEEDS
    policies = policy_names()[:-1] if quick else policy_names()
    scenarios = {name: load_scenario(name) for name in scenario_names()}
    tables: Tables = {}
    kept: dict[str, list[Run]] = {}
    every = stream_runs(scenarios.values(), policies, seeds, progress=_progress("12 scenarios"))
    for name, runs in itertools.groupby(every, key=lambda each: each.scenario):
        found = list(runs)
        by_policy = {policy: [each for each in found if each.policy == policy] for policy in policies}
        tables[name] = {policy: summarize(scenarios[name], by_policy[policy]) for policy in policies}
        kept[name] = by_policy[LIVE]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"scenarios.{'quick' if quick else 'full'}.md").write_text(render(scenarios, tables), encoding="utf-8")
    return [
        *_against_others(tables),
        *_brownout(scenarios[BROWNOUT], tables, kept[BROWNOUT]),
        _sinkhole(scenarios[SINKHOLE], kept[SINKHOLE]),
        *_stale(scenarios[STALE], tables[STALE][LIVE], kept[STALE], seeds),
        _homes(tables),
    ]


def _against_others(tables: Tables) -> list[Row]:
    names = list(baselines())
    best = {name: min((table[each] for each in names), key=_p99) for name, table in tables.items()}
    over_best = {name: _ratio(table[LIVE], best[name]) for name, table in tables.items()}
    over_queues = {name: _ratio(table[LIVE], table["queue-oracle"]) for name, table in tables.items()}
    wins = [name for name, ratio in over_best.items() if ratio <= CLEARLY_BELOW]
    worst, farthest = max(over_best, key=over_best.__getitem__), max(over_queues, key=over_queues.__getitem__)
    rest = ", ".join(f"{name} {ratio:.2f}" for name, ratio in over_best.items() if name not in wins)
    rows = [
        Row("scenarios.p99_30_below_best_baseline", len(wins), "of 12", f"not: {rest}" if rest else ""),
        Row("scenarios.p99_over_best_baseline_worst", over_best[worst], "x", f"{worst}, {best[worst].policy}"),
        Row("scenarios.p99_over_queue_oracle_median", statistics.median(over_queues.values()), "x"),
        Row("scenarios.p99_over_queue_oracle_worst", over_queues[farthest], "x", farthest),
    ]
    if all("full-oracle" in table for table in tables.values()):
        over_full = [_ratio(table[LIVE], table["full-oracle"]) for table in tables.values()]
        rows.append(Row("scenarios.p99_over_full_oracle_median", statistics.median(over_full), "x"))
    return rows


def _brownout(scenario: Scenario, tables: Tables, runs: Sequence[Run]) -> list[Row]:
    live = {name: table[LIVE] for name, table in tables.items()}
    mean, worst = (
        max(live, key=lambda name: live[name].hedge_share),
        max(live, key=lambda name: live[name].hedge_share_max),
    )
    return [
        Row("scenarios.brownout_in_time_share", live[BROWNOUT].slo_share_in_fault, "", "during the brown-out"),
        Row("scenarios.brownout_recovery_s", recovery_s(runs, scenario, scenario.faults[0].windows_s[0][1]), "s"),
        Row("scenarios.hedge_share_worst", live[mean].hedge_share, "", f"mean of {mean}"),
        Row("scenarios.hedge_share_10s_worst", live[worst].hedge_share_max, "", worst),
    ]


def _sinkhole(scenario: Scenario, runs: Sequence[Run]) -> Row:
    fault = scenario.faults[0]
    ((begin_s, end_s),) = fault.windows_s
    share = send_share(runs, fault.nodes[0], begin_s + NOTICED_S, end_s)
    return Row("scenarios.sinkhole_traffic_share", share, "", f"from {NOTICED_S:g} s after it began to fail")


def _stale(scenario: Scenario, live: Summary, runs: Sequence[Run], seeds: Sequence[int]) -> list[Row]:
    """The same foreign crowds with fresh and honest reports tell what is fair."""
    liar = next(fault.nodes[0] for fault in scenario.faults if fault.kind == "lie")
    faults = tuple(fault for fault in scenario.faults if fault.kind not in ("stale", "lie"))
    honest = msgspec.structs.replace(scenario, name="fresh-reports", faults=faults)
    found = replicate([honest], (LIVE,), seeds, progress=_progress(honest.name))[honest.name, LIVE]
    fresh = summarize(honest, found)
    begin_s, end_s = scenario.warmup_s, scenario.duration_s
    share, fair = send_share(runs, liar, begin_s, end_s), send_share(found, liar, begin_s, end_s)
    return [
        Row("scenarios.stale_p99_over_fresh", _ratio(live, fresh), "x", f"fresh {fresh.p99_ms} ms"),
        Row("scenarios.liar_over_fair_share", share / max(fair, 1e-9), "x", f"{share:.1%}, fair {fair:.1%}"),
    ]


def _homes(tables: Tables) -> Row:
    """Each baseline on the scenario it was made for."""
    others = {name: kind.home for name, kind in baselines().items() if name != "round-robin"}
    at_home = [name for name, home in others.items() if _p99(tables[home][name]) < _p99(tables[home]["round-robin"])]
    lost = ", ".join(f"{name} on {home}" for name, home in others.items() if name not in at_home)
    return Row(
        "scenarios.baselines_worse_than_round_robin_at_home",
        len(others) - len(at_home),
        "",
        lost or f"of {len(others)}",
    )


def _p99(summary: Summary) -> float:
    return summary.p99_ms.value


def _ratio(one: Summary, other: Summary) -> float:
    """p99 over p99; two that never answer that many requests are equal."""
    return 1.0 if _p99(one) == _p99(other) else _p99(one) / _p99(other)


def render(scenarios: dict[str, Scenario], tables: Tables) -> str:
    """All tables for people."""
    lines = [
        "# Scenarios",
        "",
        "Milliseconds: the mean over replications, ± its 95 % interval (Student).",
        "",
    ]
    for name, scenario in scenarios.items():
        seeds = next(iter(tables[name].values())).seeds
        lines += [f"## {name}: {scenario.title}", "", scenario.why, ""]
        lines += [f"Seeds {', '.join(map(str, seeds))}; objective {scenario.slo_ms:g} ms.", ""]
        lines += ["| policy | p50 | p99 | p99.9 | in time | hedges | no answer |", "|---|---|---|---|---|---|---|"]
        for row in tables[name].values():
            in_time = f"{row.slo_share.value:.2%} ±{row.slo_share.half_width:.2%}"
            lines.append(
                f"| {row.policy} | {row.p50_ms} | {row.p99_ms} | {row.p999_ms} | {in_time} | {row.hedge_share:.2%} "
                f"| {row.unanswered} of {row.requests} |"
            )
        lines.append("")
    return "\n".join(lines).replace(" ±nan%", "")


def _progress(name: str) -> Callable[[int, int], None]:
    def tell(done: int, every: int) -> None:
        sys.stderr.write(f"\r{name}: {done}/{every}" + ("\n" if done == every else ""))
        sys.stderr.flush()

    return tell
