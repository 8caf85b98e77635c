"""Nothing that was accepted is lost, whoever is killed and whichever link is cut; nobody gets two different answers.

A run of chaos writes down what devices, the node's link and the model saw (`chaos_run`), and a checker judges the
history (`chaos_judge`). It must find nodes with one mistake each (`chaos_mutants`). The ledger is opened on every disk
that a power cut may leave (`chaos_ledger`), and a poisonous request must be given up (`chaos_poison`).
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import chaos_ledger
from benchmarks.chaos_history import Event, save
from benchmarks.chaos_judge import FAULTS, Verdict, judge
from benchmarks.chaos_mutants import EARLY, LATE, MUTANTS
from benchmarks.chaos_poison import SAMPLES, Poisoned, poison
from benchmarks.chaos_recording import record
from benchmarks.chaos_run import Plan, live_through
from benchmarks.crash_trace import is_available
from benchmarks.memory import memory_folder
from benchmarks.rows import Row
from nearcast.telemetry import TelemetryConfig, start

FULL = Plan(node_kills=50, broker_kills=20, link_cuts=200)
QUICK = Plan(node_kills=5, broker_kills=2, link_cuts=20, pace_s=0.25)
SHORT = Plan(node_kills=5, broker_kills=2, link_cuts=15)
QUICK_SHORT = Plan(node_kills=2, broker_kills=1, link_cuts=3, devices=4, clients=1)
MUTANT = Plan(node_kills=5, broker_kills=0, link_cuts=2, devices=4, clients=0, rate_hz=8.0, pace_s=0.5)
ODD_MUTANTS = {
    EARLY: replace(MUTANT, node_kills=12, link_cuts=0, pace_s=0.2, moments=("delivered",)),
    LATE: replace(MUTANT, node_kills=2, link_cuts=0, pace_s=2.0),
}
"""What these do shows only if the node dies in the right moment, or lives for a while."""
POISON = Plan(node_kills=0, broker_kills=0, link_cuts=0, devices=4, clients=0)
VOLATILE = ("lost", "unanswered", "misdelivered", "late")
"""What a node without durability promises too: a killed one forgets its answers, and runs a request again."""
SAVED = Path(__file__).parent / "results" / "chaos.history.jsonl"


def run(*, quick: bool) -> list[Row]:
    """Chaos, its mutants, the ledger, the poison."""
    start("chaos", TelemetryConfig(level="error"))
    with memory_folder() as home:
        history = asyncio.run(live_through(QUICK if quick else FULL, home / "run"))
        verdict = judge(history)
        if verdict.faults:
            SAVED.parent.mkdir(exist_ok=True)
            save(history, SAVED)
        rows = [*_run_rows(history, verdict), *_duplicate_rows(history, verdict)]
        rows += asyncio.run(_others(home, quick=quick))
        if is_available():
            rows += _ledger_rows(home / "ledger", quick=quick)
    return rows


async def _others(home: Path, *, quick: bool) -> list[Row]:
    """The smaller runs, some side by side: they count what happened, not how fast."""
    short = QUICK_SHORT if quick else SHORT
    plans = {"volatile": replace(short, durability="none"), "reboot": replace(short, reboots=True)}
    if find_spec("iotcore") is not None:
        plans["iotcore"] = replace(short, broker="iotcore")
    async with asyncio.TaskGroup() as group:
        poisoned = group.create_task(poison(POISON, home / "poison"))
        verdicts = {name: group.create_task(_live(plan, home / name)) for name, plan in plans.items()}
    rows = [_short_row(name, verdict.result()) for name, verdict in verdicts.items()]
    return [*_poison_rows(poisoned.result()), *rows, *_mutant_rows(await _live_mutants(home))]


async def _live(plan: Plan, folder: Path) -> Verdict:
    return judge(await live_through(plan, folder))


def _run_rows(history: Sequence[Event], verdict: Verdict) -> list[Row]:
    for example in verdict.examples:
        print(f"chaos: {example}", file=sys.stderr)
    kinds, counts, faults = Counter(event.kind for event in history), verdict.counts, verdict.faults
    said = f"{counts['accepted']} of {counts['requests']} were accepted, {counts['answered']} answered"
    again = f"{counts['repeats']} repeats of {counts['answered']} answers"
    kept = f"{counts['data_lost_in_window']} lost by killed brokers in time; {counts['data_buried']} dead letters"
    return [
        Row("chaos.node_kills", kinds["node killed"], "", f"{kinds['node ready']} times ready"),
        Row("chaos.broker_kills", kinds["broker killed"], "", "it restarts empty"),
        Row("chaos.link_cuts", kinds["link cut"], "", "of node and devices, in five ways"),
        Row("chaos.accepted_lost", faults["lost"], "requests", said),
        Row("chaos.unanswered", faults["unanswered"], "requests", f"{counts['expired']} expired in an outage"),
        Row("chaos.answered_differently", faults["different"], "requests", again),
        Row("chaos.repeats_unmarked", faults["unmarked"], "answers", again),
        Row("chaos.misdelivered", faults["misdelivered"], "answers"),
        Row("chaos.late", faults["late"], "answers"),
        Row("chaos.answered_with_failure", counts["failed"], "requests", "500, 504 and the like; 408 where it expired"),
        Row("chaos.data_sent", counts["data_sent"], "messages"),
        Row("chaos.data_lost_outside_window", faults["data_lost"], "messages", kept),
        Row("chaos.data_answered_differently", faults["data_different"], "messages"),
        Row("chaos.data_out_of_order", faults["data_order"], "messages"),
        Row("chaos.data_state_wrong", faults["data_state"], "messages", "of a model that counts what it is given"),
    ]


def _duplicate_rows(history: Sequence[Event], verdict: Verdict) -> list[Row]:
    answered: dict[str, float] = {}
    kills: list[float] = []
    repeated: set[str] = set()
    across: set[str] = set()
    for event in history:
        if event.kind == "answered":
            answered.setdefault(event.key, event.at)
        elif event.kind == "node killed":
            kills.append(event.at)
        elif event.kind == "again":
            repeated.add(event.key)
            if kills and answered.get(event.key, event.at) < kills[-1]:
                across.add(event.key)
    share = len(repeated) / max(1, verdict.counts["requests"])
    note = f"{verdict.counts['runs_repeated']} runs again of what had no answer yet"
    return [
        Row("chaos.duplicates_share", share, "share", f"of {verdict.counts['requests']} requests"),
        Row("chaos.duplicates_across_restart", len(across), "requests", "answered, node killed, asked again"),
        Row("chaos.reruns", verdict.faults["rerun"], "runs", note),
    ]


def _poison_rows(found: Poisoned) -> list[Row]:
    is_over = found.status == 500 and found.letters == 2 and found.results == SAMPLES
    letters = f"{found.letters} dead letters; {found.results} of {SAMPLES} other samples of its stream have a result"
    return [
        Row("chaos.poison_crashes", found.crashes, "", f"by a request; then it is answered {found.status}"),
        Row("chaos.poison_data_crashes", found.data_crashes, "", "by a sample of a stream"),
        Row("chaos.poison_quarantined", is_over, "", letters),
        Row("chaos.poison_others_failed", found.others_failed, "requests", f"of {found.others} meanwhile"),
    ]


async def _live_mutants(home: Path) -> dict[str, Verdict]:
    plans = [replace(ODD_MUTANTS.get(name, MUTANT), wrong=name) for name in MUTANTS]
    verdicts = await asyncio.gather(*(_live(plan, home / f"mutant-{n}") for n, plan in enumerate(plans)))
    return dict(zip(MUTANTS, verdicts, strict=True))


def _mutant_rows(verdicts: dict[str, Verdict]) -> list[Row]:
    for name, verdict in verdicts.items():
        print(f"mutant {name}: {dict(verdict.faults) or 'NOT FOUND'}", file=sys.stderr)
    caught = sum(any(verdict.faults[fault] for fault in MUTANTS[name]) for name, verdict in verdicts.items())
    return [Row("chaos.mutants_caught", caught / len(MUTANTS), "share", f"of {len(MUTANTS)} live ones")]


def _short_row(what: str, verdict: Verdict) -> Row:
    """The faults of a shorter run, under other conditions."""
    names = VOLATILE if what == "volatile" else FAULTS
    for example in verdict.examples:
        if example.startswith(names):
            print(f"{what}: {example}", file=sys.stderr)
    counts = verdict.counts
    note = f"{counts['requests']} requests, {counts['answered']} answered, {counts['repeats']} repeats"
    return Row(f"chaos.{what}_faults", sum(verdict.faults[name] for name in names), "", note)


def _ledger_rows(folder: Path, *, quick: bool) -> list[Row]:
    calls = asyncio.run(record(folder / "life", requests=15 if quick else 75))
    found = chaos_ledger.replay(calls, folder / "image", per_position=1)
    for example in found.examples:
        print(f"ledger: {example}", file=sys.stderr)
    faults = {name: chaos_ledger.first_fault_of(name, calls, folder / "mutant") for name in chaos_ledger.MUTANTS}
    for name, fault in faults.items():
        print(f"mutant of the ledger, {name}: {fault or 'NOT FOUND'}"[:160], file=sys.stderr)
    caught = sum(map(bool, faults.values())) / len(faults)
    moved = f"{sum(call.name == 'write' and call.path == chaos_ledger.LEDGER for call in calls)} pages moved"
    return [
        Row("chaos.ledger_images", found.images, "images", f"of {len(calls)} calls, {found.sends} sends; {moved}"),
        Row("chaos.ledger_violations", found.violations, ""),
        Row("chaos.ledger_unsynced_pubacks", found.unsynced, "", "PUBACKs that no sync of the log preceded"),
        Row("chaos.ledger_mutants_caught", caught, "share", f"of {len(faults)}"),
    ]
