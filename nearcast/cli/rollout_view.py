"""How a channel looks to its operator: what is picked, what the nodes say, and how the trial stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nearcast.cli.listing import printable

BAR_WIDTH = 12
NAMES_MAX = 8


def view(status: Mapping[str, Any], now: float) -> Group:
    """The whole channel. `status` is what `GET /v1/channels/{channel}/status` answers, `now` in seconds since 1970."""
    head = Text.assemble(
        ("channel ", "dim"), (printable(status["channel"]), "bold"), ("  intent ", "dim"), str(status["intent"]),
        ("  nodes reporting ", "dim"), str(status["reporting"]),
    )  # fmt: skip
    if status["silent"]:
        more = len(status["silent"]) - NAMES_MAX
        names = ", ".join(map(printable, status["silent"][:NAMES_MAX])) + (f" and {more} more" if more > 0 else "")
        head.append(f"  silent {len(status['silent'])}: {names}", "yellow")
    parts: list[RenderableType] = [head]
    for rollout in status["rollouts"]:
        parts += [Text(""), *_model(rollout, now, auto_stop=status["auto_stop"])]
    if not status["rollouts"]:
        parts.append(Text("No models yet."))
    return Group(*parts)


def _model(rollout: Mapping[str, Any], now: float, *, auto_stop: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [_title(rollout, now), _releases(rollout)]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("  nodes", _nodes(rollout))
    if rollout["candidate"] is not None:
        facts.add_row("  trial", _verdict(rollout["trial"], auto_stop=auto_stop))
    for ban in rollout["quarantined"]:
        reasons = "; ".join(printable(reason) for reason in ban["reasons"][:2])
        facts.add_row("  quarantine", Text(f"{ban['release']} on {_count(ban['nodes'], 'node')}: {reasons}", "red"))
    for error, count in list(rollout["errors"].items())[:2]:
        facts.add_row("  says", Text(f"{_count(count, 'node')}: {printable(error)}", "yellow"))
    return [*parts, facts]


def _title(rollout: Mapping[str, Any], now: float) -> Text:
    title = Text.assemble((printable(rollout["model"]), "bold cyan"), ("  stable ", "dim"), str(rollout["stable"]))
    if rollout["candidate"] is not None:
        title.append_text(
            Text.assemble(
                ("  candidate ", "dim"), (str(rollout["candidate"]), "bold"), ("  share ", "dim"),
                f"{rollout['share']:.0%}", (" of the requests  wave ", "dim"), f"{rollout['wave']:.0%}",
                (" of the nodes", "dim"),
            )
        )  # fmt: skip
    if rollout["rollback"]:
        title.append("  rolled back", "yellow")
    if rollout["by"]:
        title.append(f"  by {printable(rollout['by'])} {_ago(now - rollout['at'])} ago", "dim")
    if rollout["reason"]:
        title.append(f"  “{printable(rollout['reason'])}”", "italic")
    return title


def _releases(rollout: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim", pad_edge=True)
    table.add_column("release")
    for column in ("requests", "errors", "p50 ms", "p99 ms", "other answers"):
        table.add_column(column, justify="right", no_wrap=True)
    for slot in ("stable", "candidate"):
        release = rollout[slot]
        if release is None:
            continue
        one = rollout["releases"][str(release)]
        compared = f"{_share(one['disagreed'], one['compared'])} of {one['compared']:,}" if one["compared"] else "-"
        errors = _share(one["errors"], one["requests"])
        asked = one["requests"] > 0
        table.add_row(
            f"{slot} {release}", f"{one['requests']:,}", errors, f"{one['p50_ms']:.2f}" if asked else "-",
            f"{one['p99_ms']:.2f}" if asked else "-", compared,
        )  # fmt: skip
    return table


def _nodes(rollout: Mapping[str, Any]) -> Text:
    states = "  ".join(f"{printable(state)} {count}" for state, count in sorted(rollout["states"].items()))
    parts = [states or "no reports yet"]
    if rollout["candidate"] is not None:
        parts.append(f"candidate on {rollout['candidate_nodes']}")
    if rollout["received_bytes"]:
        parts.append(f"{_size(rollout['received_bytes'])} received")
    if rollout.get("loaded"):
        loaded = ", ".join(f"{release} on {count}" for release, count in sorted(rollout["loaded"].items()))
        parts.append(f"in memory: {loaded}")
    return Text("  ·  ".join(parts))


def _verdict(verdict: Mapping[str, Any] | None, *, auto_stop: bool) -> Text:
    if verdict is None or not verdict["findings"]:
        return Text("nothing reported of both releases yet")
    text = Text()
    for name, finding in verdict["findings"].items():
        progress = min(1.0, max(0.0, finding["progress"]))
        style = "green" if progress < 0.5 else "yellow" if progress < 1.0 else "red"
        filled = round(progress * BAR_WIDTH)
        text.append(f"{name} ", "dim")
        text.append("█" * filled + "░" * (BAR_WIDTH - filled), style)
        text.append(f" {progress:.0%}  ")
    if verdict["reason"]:
        text.append(f"FAILED: {printable(verdict['reason'])}", "bold red")
        text.append("" if auto_stop else "; stop it: nearcast rollout stop", "red")
    else:
        doubtful = any(finding["progress"] >= 0.5 for finding in verdict["findings"].values())
        text.append("not sure yet" if doubtful else "no reason to stop", "yellow" if doubtful else "green")
    return text


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def _ago(seconds: float) -> str:
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
