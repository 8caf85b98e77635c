"""Judges a history: what was lost, answered differently, late, delivered to another, run again. Pure.

`python -m benchmarks.chaos_judge FILE` judges a history that was saved.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.chaos_history import Event, Kind, body_of, load

PATIENT_S = 40.0
"""A request with at least this time to live outlives every outage of a run: it must be answered, not expire."""
LATE_S = 2.0
"""Message Expiry counts whole seconds, and a busy machine delays what has arrived in time."""
BROKER_WINDOW_S = 6.0
"""A killed broker may have lost `up/data` that it took within its autosave interval, here 5 s; a second is added.
And what its empty successor took before the node had subscribed again: nobody was there to get it."""
SUBSCRIBING_S = 0.5
EXAMPLES_MAX = 20
OK: Final = 200
COME_AGAIN = frozenset({429, 503})
"""No answers: the request was not accepted, and the device is told to ask again."""
FAULTS = (
    "lost",
    "unanswered",
    "different",
    "misdelivered",
    "late",
    "rerun",
    "unmarked",
    "data_lost",
    "data_different",
    "data_order",
    "data_state",
)


@dataclass(slots=True)
class Verdict:
    """What a history shows: faults by name with a few in words, and counts of what is allowed."""

    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def blame(self, fault: str, event: Event, why: str) -> None:
        """Count one fault."""
        self.faults[fault] += 1
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(f"{fault}: {event.device} {event.key} at {event.at:.3f}: {why}")


def judge(history: Sequence[Event]) -> Verdict:
    """Judge a history in the order of time. It must have been quiet at its end, all being up."""
    verdict = Verdict()
    requests = _by_key(history, ("asked", "again", "accepted", "ran", "replied", "answered"))
    faults = [event for event in history if event.kind in ("node killed", "broker killed", "link cut")]
    for events in requests.values():
        _judge_request(events, faults, verdict)
    windows = _windows(history)
    letters = {
        (event.device, event.key, event.digest) for event in history if event.kind == "buried" and event.body == "input"
    }
    buried = Counter((device, stream) for device, stream, _ in letters)
    for (device, key), events in _by_key(history, ("sent", "kept", "taken", "event")).items():
        stream = device, key.partition("/")[0]
        if events["sent"] and events["taken"] and not events["event"] and buried[stream]:
            buried[stream] -= 1  # it was running in three crashes, and is kept for somebody to look at
            verdict.counts["data_sent"] += 1
            verdict.counts["data_buried"] += 1
        else:
            _judge_data(events, windows, verdict)
    _judge_order([event for event in history if event.kind == "event"], verdict)
    return verdict


def _by_key(history: Sequence[Event], kinds: tuple[Kind, ...]) -> Mapping[tuple[str, str], Mapping[Kind, list[Event]]]:
    """Device and key → kind → events."""
    found: dict[tuple[str, str], dict[Kind, list[Event]]] = {}
    for event in history:
        if event.kind in kinds:
            found.setdefault((event.device, event.key), {kind: [] for kind in kinds})[event.kind].append(event)
    return found


def _judge_request(events: Mapping[Kind, list[Event]], faults: Sequence[Event], verdict: Verdict) -> None:
    asked = events["asked"]
    replied, answered = _final(events["replied"]), _final(events["answered"])
    if not asked:
        for stray in [*events["replied"], *events["answered"]]:
            verdict.blame("misdelivered", stray, "an answer to what this device never asked")
        return
    first = asked[0]
    verdict.counts["requests"] += 1
    verdict.counts["accepted"] += bool(events["accepted"])
    verdict.counts["answered"] += bool(answered)
    verdict.counts["again"] += len(events["again"])
    verdict.counts["repeats"] += max(0, len(answered) - 1)
    verdict.counts["refused"] += len(events["answered"]) - len(answered)
    verdict.counts["failed"] += any(event.status != OK for event in answered[:1])
    _judge_lost(first, events, faults, verdict)
    _judge_content(first, [*replied, *answered], verdict)
    _judge_runs(events, verdict)
    ttl_s = first.deadline - first.at
    for event in answered:
        last = max(ask.at for ask in [first, *events["again"]] if ask.at <= event.at or ask is first)
        if event.status == OK and event.at > last + ttl_s + LATE_S:
            verdict.blame("late", event, f"{event.at - last - ttl_s:.1f} s after its deadline")
    for event in replied[1:]:
        if not event.marked:
            verdict.blame("unmarked", event, "an answer is sent again without saying so")


def _final(answers: Sequence[Event]) -> Sequence[Event]:
    return [event for event in answers if event.status not in COME_AGAIN]


def _judge_lost(first: Event, events: Mapping[Kind, list[Event]], faults: Sequence[Event], verdict: Verdict) -> None:
    """Accepted = acknowledged by the node: then there is an answer, or the time ran out. A patient one's never does."""
    is_patient = first.deadline - first.at >= PATIENT_S
    if events["accepted"] and not events["replied"]:
        verdict.counts["expired_accepted"] += not is_patient
        if is_patient:
            verdict.blame("lost", first, "the node acknowledged it and never answered")
    if _final(events["answered"]):
        return
    verdict.counts["expired"] += 1
    if is_patient and not first.once:
        verdict.blame("unanswered", first, "its device kept asking")
    elif is_patient and not any(first.at - LATE_S <= fault.at for fault in faults):
        verdict.blame("unanswered", first, "nothing was killed or cut meanwhile")


def _judge_content(first: Event, answers: Sequence[Event], verdict: Verdict) -> None:
    for event in answers:
        if event.digest != answers[0].digest:
            verdict.blame("different", event, f"{event.status} {event.digest}, before {answers[0].digest}")
        if event.status == OK and event.body != body_of(first.device, first.key).hex():
            verdict.blame("misdelivered", event, "it answers another request")


def _judge_runs(events: Mapping[Kind, list[Event]], verdict: Verdict) -> None:
    """A request is completed once an answer was seen; nothing runs it afterwards, and no process runs it twice."""
    answers = _final([*events["replied"], *events["answered"]])
    completed = min((event.at for event in answers), default=float("inf"))
    lives: set[int] = set()
    for run in events["ran"]:
        if run.at > completed:
            verdict.blame("rerun", run, "it was answered before")
        elif run.life in lives:
            verdict.blame("rerun", run, f"process {run.life} ran it before")
        lives.add(run.life)
    verdict.counts["runs_repeated"] += max(0, len(events["ran"]) - 1)


def _windows(history: Sequence[Event]) -> Sequence[tuple[float, float]]:
    """For each broker that was killed: when that was, and when the node had subscribed to its empty successor."""
    windows = []
    for kill in history:
        if kill.kind == "broker killed":
            ready = [event.at for event in history if event.kind == "node ready" and event.at > kill.at]
            subscribed = max((at for at in ready if at <= ready[0] + SUBSCRIBING_S), default=float("inf"))
            windows.append((kill.at, subscribed))
    return windows


def _judge_data(events: Mapping[Kind, list[Event]], windows: Sequence[tuple[float, float]], verdict: Verdict) -> None:
    sent, kept, taken, results = events["sent"], events["kept"], events["taken"], events["event"]
    if not sent:
        for stray in results:
            verdict.blame("misdelivered", stray, "a result of what this device never sent")
        return
    verdict.counts["data_sent"] += 1
    for event in results:
        if event.digest != results[0].digest:
            verdict.blame("data_different", event, f"{event.digest}, before {results[0].digest}")
    if results:
        verdict.counts["data_repeats"] += len(results) - 1
    elif taken:
        verdict.blame("data_lost", sent[0], "the node acknowledged it and sent no result")
    elif kept and any(
        sent[0].at <= killed <= kept[-1].at + BROKER_WINDOW_S or (killed <= kept[-1].at and sent[0].at <= subscribed)
        for killed, subscribed in windows
    ):
        verdict.counts["data_lost_in_window"] += 1
    else:
        verdict.blame("data_lost", sent[0], "no broker was killed while it held this" if kept else "it was not kept")


def _judge_order(results: Sequence[Event], verdict: Verdict) -> None:
    """First results of a stream come in the order of its messages; each says one more than the one before."""
    last: dict[tuple[str, str], tuple[int, int]] = {}
    seen: set[tuple[str, str]] = set()
    for event in results:
        if (event.device, event.key) in seen or not event.body:
            continue
        seen.add((event.device, event.key))
        stream, _, number = event.key.rpartition("/")
        seq, tally = int(number), int(event.body)
        before, said = last.get((event.device, stream), (0, 0))
        if seq <= before:
            verdict.blame("data_order", event, f"behind {before}")
        if tally != said + 1:
            verdict.blame("data_state", event, f"the model said {tally}, before {said}")
        last[event.device, stream] = seq, tally


def faults_in_words(verdict: Verdict) -> Iterator[str]:
    """Examples, then the counts."""
    yield from verdict.examples
    yield f"faults {dict(verdict.faults)}"
    yield f"counts {dict(verdict.counts)}"


if __name__ == "__main__":
    for line in faults_in_words(judge(load(Path(sys.argv[1])))):
        print(line)
