"""A page about one scenario that needs nothing but itself: tables, and figures as inline SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from simulations.experiment import LIVE, ORACLES, Run
from simulations.figure import Axis, Curve, draw_bars, draw_curves
from simulations.report import Summary
from simulations.scenario import Fault, Scenario

_WINDOW_S = 1.0
_PALETTE = ("#4e79a7", "#f28e2b", "#76b7b2", "#b07aa1", "#9c755f", "#8c8c8c", "#edc948")
_LIVE_COLOUR, _ORACLE_COLOURS = "#c8102e", ("#2e7d32", "#81c784")
_TIMELINE_BASELINES = 2
"""So many baselines, the best ones, have a curve beside the live policy and the queue oracle."""
_STYLE = """
body { font: 16px/1.5 Georgia, 'Times New Roman', serif; color: #1b1b1b }
body { max-width: 860px; margin: 3em auto; padding: 0 1.2em }
h1 { font-size: 1.7em; line-height: 1.2; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2.2em 0 .4em }
.lead { font-size: 1.05em; color: #444 } figure { margin: 1em 0 } figcaption { font-size: .9em; color: #555 }
svg { width: 100%; height: auto } svg text { font-family: Helvetica, Arial, sans-serif }
table { border-collapse: collapse; font-size: .88em; width: 100%; border-top: 2px solid; border-bottom: 2px solid }
th { border-bottom: 1px solid; font-weight: 600 } td, th { padding: .22em .6em; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } .live td { font-weight: 700; color: #c8102e }
footer { margin-top: 3em; font-size: .82em; color: #666 }
"""


def render_page(scenario: Scenario, runs: Mapping[str, Sequence[Run]], summaries: Sequence[Summary]) -> str:
    """HTML for one scenario. `runs` by policy, one a seed; `summaries` in the order of the table."""
    colours = _colours([row.policy for row in summaries])
    drawn = _timeline_policies(summaries)
    body = [
        f"<h1>{html.escape(scenario.title)}</h1>",
        f'<p class="lead">{html.escape(scenario.why)}</p>',
        _table(scenario, summaries),
        "<h2>99th percentile</h2>",
        _figure(
            draw_bars(
                [(row.policy, row.p99_ms.value, row.p99_ms.half_width, colours[row.policy]) for row in summaries]
            ),
            "Latency that one request in a hundred exceeds; a request without an answer counts as infinitely late (∞).",
        ),
        "<h2>Distribution</h2>",
        _figure(
            _draw_tails(scenario, runs, colours),
            "Share of requests that take longer, on a logarithmic scale: a line that ends low has a short tail.",
        ),
        "<h2>Timeline</h2>",
        _figure(
            _draw_timeline(scenario, runs, drawn, colours),
            f"95th percentile of each {_WINDOW_S:g} s. Grey: " + html.escape(_describe(scenario.faults)),
        ),
        "<h2>Fleet and load</h2>",
        _fleet(scenario),
        _footer(scenario, summaries[0]),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(scenario.name)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _colours(policies: Sequence[str]) -> dict[str, str]:
    plain = [policy for policy in policies if policy != LIVE and policy not in ORACLES]
    colours = {policy: _PALETTE[at % len(_PALETTE)] for at, policy in enumerate(plain)}
    return colours | dict(zip(ORACLES, _ORACLE_COLOURS, strict=True)) | {LIVE: _LIVE_COLOUR}


def _timeline_policies(summaries: Sequence[Summary]) -> list[str]:
    plain = sorted(
        (row for row in summaries if row.policy != LIVE and row.policy not in ORACLES), key=lambda row: row.p99_ms.value
    )
    present = {row.policy for row in summaries}
    ends = [policy for policy in ("queue-oracle", LIVE) if policy in present]
    return [row.policy for row in plain[:_TIMELINE_BASELINES]] + ends


def _table(scenario: Scenario, summaries: Sequence[Summary]) -> str:
    heads = ("policy", "p50 ms", "p99 ms", "p99.9 ms", f"≤ {scenario.slo_ms:g} ms", "hedges", "no answer")
    lines = []
    for row in summaries:
        cells = (
            *(row.policy, str(row.p50_ms), str(row.p99_ms), str(row.p999_ms)),
            *(f"{row.slo_share.value:.2%}", f"{row.hedge_share:.1%}", str(row.unanswered)),
        )
        mark = ' class="live"' if row.policy == LIVE else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>".replace("inf", "∞")


def _draw_tails(scenario: Scenario, runs: Mapping[str, Sequence[Run]], colours: Mapping[str, str]) -> str:
    curves, longest = [], scenario.slo_ms * 2.5
    shares = np.concatenate([np.linspace(1.0, 0.1, 60), np.geomspace(0.1, 1e-3, 120)])
    for policy, each in sorted(runs.items(), key=lambda item: item[0] == LIVE):
        ordered = np.sort(np.concatenate([run.latency_s for run in each])) * 1e3
        at = np.minimum(((1.0 - shares) * len(ordered)).astype(int), len(ordered) - 1)
        points = [(float(x), float(y)) for x, y in zip(ordered[at], shares, strict=True) if x <= longest]
        curves.append(Curve(name=policy, colour=colours[policy], points=points, wide=policy == LIVE))
    return draw_curves(
        curves,
        Axis(title="latency, ms", low=0.0, high=longest),
        Axis(title="share of requests above", low=1e-3, high=1.0, is_log=True),
        marks=[(scenario.slo_ms, "objective")],
    )


def _draw_timeline(
    scenario: Scenario, runs: Mapping[str, Sequence[Run]], drawn: Sequence[str], colours: Mapping[str, str]
) -> str:
    curves, highest = [], min(scenario.deadline_ms, 5.0 * scenario.slo_ms)
    for policy in drawn:
        at = np.concatenate([run.at_s for run in runs[policy]])
        late = np.concatenate([run.latency_s for run in runs[policy]]) * 1e3
        points = []
        for begin_s in np.arange(scenario.warmup_s, scenario.duration_s - _WINDOW_S / 2, _WINDOW_S):
            inside = np.sort(late[(at >= begin_s) & (at < begin_s + _WINDOW_S)])
            if len(inside):
                p95 = float(inside[int(0.95 * len(inside))])
                points.append((float(begin_s) + _WINDOW_S / 2, min(p95, highest)))
        curves.append(Curve(name=policy, colour=colours[policy], points=points, wide=policy == LIVE))
    return draw_curves(
        curves,
        Axis(title="time, s", low=scenario.warmup_s, high=scenario.duration_s),
        Axis(title="p95, ms", low=10.0, high=highest, is_log=True),
        bands=sorted({window for fault in scenario.faults for window in fault.windows_s}),
    )


def _describe(faults: Sequence[Fault]) -> str:
    spans = [
        f"{fault.kind} at {', '.join(fault.nodes)} ({', '.join(f'{a:g} to {b:g} s' for a, b in fault.windows_s)})"
        for fault in faults
    ]
    return ("; ".join(spans) or "no faults") + "."


def _fleet(scenario: Scenario) -> str:
    heads = ("node", "tier", "slots", "round trip, ms", "model time, ms", "stalls", "foreign rps")
    lines = []
    for node in scenario.nodes:
        stalls = f"{node.stall_share:.1%} for {node.stall_ms:g} ms"
        cells = (node.name, node.tier, node.slots, node.rtt_ms, node.service_ms, stalls, node.foreign_rps)
        lines.append("<tr>" + "".join(f"<td>{html.escape(f'{cell}')}</td>" for cell in cells) + "</tr>")
    rates = ", ".join(f"{phase.rate_rps:g} rps from {phase.from_s:g} s" for phase in scenario.load)
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table><p>Load: {rates}.</p>"


def _footer(scenario: Scenario, first: Summary) -> str:
    return (
        f"<footer>Scenario <code>{html.escape(scenario.name)}</code>, seeds {', '.join(map(str, first.seeds))}, "
        f"{first.requests} requests for each policy; trace {html.escape(first.trace_hash[:16])}. Every policy met the "
        "same arrivals, model times, stalls and network. Intervals are Student's, 95 %, across seeds.</footer>"
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
