"""The checker of histories: an honest one is clean, and each mistake in one is found under its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chaos_history import Event, Kind, body_of, load, save
from benchmarks.chaos_judge import BROKER_WINDOW_S, FAULTS, LATE_S, PATIENT_S, judge
from benchmarks.chaos_proxy import take_frames

replace = msgspec.structs.replace


def request(at: float, device: str, key: str, *, once: bool = False) -> list[Event]:
    """A request that is accepted, run, answered, asked again and answered again."""
    answer = {"device": device, "key": key, "status": 200, "digest": f"of {key}", "body": body_of(device, key).hex()}
    own = {"device": device, "key": key}
    return [
        Event(at=at, kind="asked", deadline=at + 2 * PATIENT_S, once=once, **own),
        Event(at=at + 0.01, kind="accepted", **own),
        Event(at=at + 0.02, kind="ran", life=1, **own),
        Event(at=at + 0.03, kind="replied", **answer),
        Event(at=at + 0.04, kind="answered", **answer),
        Event(at=at + 0.05, kind="again", **own),
        Event(at=at + 0.06, kind="accepted", **own),
        Event(at=at + 0.07, kind="replied", marked=True, **answer),
        Event(at=at + 0.08, kind="answered", marked=True, **answer),
    ]


def data(at: float, device: str, key: str) -> list[Event]:
    """A message of a stream that is kept by the broker, taken by the node, and has its result."""
    kinds: list[Kind] = ["sent", "kept", "taken", "event"]
    said = key.rpartition("/")[2]
    return [
        Event(at=at + 0.01 * n, kind=kind, device=device, key=key, digest="d" if kind == "event" else "", body=said)
        for n, kind in enumerate(kinds)
    ]


def honest() -> list[Event]:
    """Two devices, requests and a stream, and faults that explain nothing."""
    events = [
        Event(at=50.0, kind="broker killed"),
        Event(at=51.0, kind="node ready"),
        Event(at=300.0, kind="node killed", life=1),
    ]
    for number in range(10):
        events += request(100.0 + number, f"d{number % 2}", f"{number:04x}", once=number % 3 == 0)
        events += data(100.5 + number, "s0", f"mic/b/{number + 1}")
    return in_order(events)


def in_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.at)


def find(events: list[Event], kind: Kind, key: str = "0004") -> Event:
    return next(event for event in events if event.kind == kind and event.key == key)


def without(events: list[Event], *kinds: Kind, key: str = "0004") -> list[Event]:
    return [event for event in events if event.key != key or event.kind not in kinds]


def with_change(events: list[Event], kind: Kind, **changes: object) -> list[Event]:
    """The last event of this kind of one request is changed."""
    last = [event for event in events if event.key == "0004" and event.kind == kind][-1]
    return in_order([replace(event, **changes) if event is last else event for event in events])


@dataclass(frozen=True)
class Mutant:
    fault: str
    mutate: Callable[[list[Event]], list[Event]]


MUTANTS = {
    "accepted, never answered": Mutant("lost", lambda e: without(e, "replied", "answered", "ran")),
    "accepted, never answered, asked once": Mutant(
        "lost", lambda e: [replace(event, once=True) for event in without(e, "replied", "answered")]
    ),
    "never accepted, never answered": Mutant(
        "unanswered", lambda e: without(e, "accepted", "ran", "replied", "answered")
    ),
    "other bytes the second time": Mutant("different", lambda e: with_change(e, "answered", digest="other")),
    "other bytes on the wire alone": Mutant("different", lambda e: with_change(e, "replied", digest="other")),
    "a failure after a success": Mutant("different", lambda e: with_change(e, "replied", status=500, digest="other")),
    "another's result": Mutant("misdelivered", lambda e: with_change(e, "answered", body="00" * 8)),
    "to another device": Mutant("misdelivered", lambda e: with_change(e, "answered", device="d7")),
    "under another correlation": Mutant("misdelivered", lambda e: with_change(e, "replied", key="ffff")),
    "after the deadline": Mutant(
        "late", lambda e: with_change(e, "answered", at=find(e, "asked").deadline + LATE_S + 0.1)
    ),
    "run after its answer": Mutant(
        "rerun", lambda e: in_order([*e, replace(find(e, "ran"), at=find(e, "answered").at + 1, life=2)])
    ),
    "run twice by one process": Mutant(
        "rerun", lambda e: in_order([*e, replace(find(e, "ran"), at=find(e, "ran").at + 0.001)])
    ),
    "sent again without a mark": Mutant("unmarked", lambda e: with_change(e, "replied", marked=False)),
    "taken, no result": Mutant("data_lost", lambda e: without(e, "event", key="mic/b/4")),
    "kept, not taken, no kill": Mutant("data_lost", lambda e: without(e, "event", "taken", key="mic/b/4")),
    "another result the second time": Mutant(
        "data_different", lambda e: in_order([*e, replace(find(e, "event", "mic/b/4"), at=200.0, digest="other")])
    ),
    "results in another order": Mutant(
        "data_order",
        lambda e: in_order([replace(x, at=x.at + 1.5) if x is find(e, "event", "mic/b/4") else x for x in e]),
    ),
    "a message left out of the state": Mutant(
        "data_state", lambda e: [replace(x, body="3") if x is find(e, "event", "mic/b/4") else x for x in e]
    ),
    "a result of nothing": Mutant(
        "misdelivered", lambda e: in_order([*e, replace(find(e, "event", "mic/b/4"), key="mic/b/99")])
    ),
}


def test_an_honest_history_is_clean() -> None:
    verdict = judge(honest())
    assert not verdict.faults
    assert verdict.counts["requests"] == verdict.counts["accepted"] == verdict.counts["answered"] == 10
    assert (verdict.counts["repeats"], verdict.counts["data_sent"]) == (10, 10)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mistake_is_found_under_its_name(name: str) -> None:
    mutant = MUTANTS[name]
    verdict = judge(mutant.mutate(honest()))
    assert verdict.faults[mutant.fault] >= 1, verdict
    assert verdict.examples
    assert set(verdict.faults) <= set(FAULTS)


def test_what_the_broker_may_lose_is_counted_and_only_within_its_window() -> None:
    lost = [replace(e, body="") if e.kind == "event" else e for e in without(honest(), "event", "taken", key="mic/b/4")]
    sent = find(lost, "sent", "mic/b/4").at
    inside = judge(in_order([*lost, Event(at=sent + 0.5, kind="broker killed")]))
    assert not inside.faults
    assert inside.counts["data_lost_in_window"] == 1
    before = Event(at=sent - 0.1, kind="broker killed")
    for history in (
        [*lost, Event(at=sent + BROKER_WINDOW_S + 1.0, kind="broker killed")],
        [*lost, before, Event(at=sent - 0.05, kind="node ready")],
    ):
        assert judge(in_order(history)).faults["data_lost"] == 1
    unheard = judge(in_order([*lost, before, Event(at=sent + 0.05, kind="node ready")]))
    assert unheard.counts["data_lost_in_window"] == 1, "the empty successor had no subscriber yet"


def test_a_dead_letter_stands_for_one_sample_of_its_stream() -> None:
    lost = without(without(honest(), "event", key="mic/b/4"), "event", key="mic/b/7")
    lost = [replace(event, body="") if event.kind == "event" else event for event in lost]
    letter = Event(at=200.0, kind="buried", device="s0", key="mic", body="input")
    verdict = judge(in_order([*lost, letter]))
    assert (verdict.faults, verdict.counts["data_buried"]) == ({"data_lost": 1}, 1)
    assert judge(in_order([*lost, replace(letter, key="other")])).faults == {"data_lost": 2}


def test_only_a_request_with_little_time_may_expire() -> None:
    asked = Event(at=10.0, kind="asked", device="d", key="1", deadline=10.5, once=True)
    accepted = Event(at=10.1, kind="accepted", device="d", key="1")
    verdict = judge([asked, accepted])
    assert not verdict.faults
    assert (verdict.counts["expired"], verdict.counts["expired_accepted"]) == (1, 1)
    patient = replace(asked, deadline=10.0 + PATIENT_S)
    assert judge([patient, accepted]).faults == {"lost": 1, "unanswered": 1}
    outage = Event(at=10.2, kind="link cut")
    assert judge([patient, accepted, outage]).faults == {"lost": 1}
    assert not judge([patient, outage]).faults, "it was asked once and never heard"
    assert judge([replace(patient, once=False), outage]).faults == {"unanswered": 1}


def test_a_refusal_is_no_answer() -> None:
    refused = Event(at=100.001, kind="answered", device="d0", key="0004", status=429, digest="come again")
    history = [event for event in honest() if event.key == "0004"]
    assert not judge(in_order([*history, refused])).faults


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_the_order_of_equal_instants_and_other_requests_change_nothing(draw: random.Random) -> None:
    name = draw.choice(sorted(MUTANTS))
    spoiled = MUTANTS[name].mutate(honest())
    more = [event for n in range(5) for event in request(draw.uniform(0, 500), "d9", f"{n:08x}")]
    assert judge(in_order([*spoiled, *more])).faults == judge(spoiled).faults


def test_a_history_survives_its_file(tmp_path) -> None:
    save(honest(), tmp_path / "history.jsonl")
    assert load(tmp_path / "history.jsonl") == honest()


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 7))
def test_frames_come_whole_however_they_are_cut(bodies: list[bytes], step: int) -> None:
    frames = [b"\x30" + length_of(body) + body for body in bodies]
    stream, buffer, got = b"".join(frames), bytearray(), []
    for at in range(0, len(stream), step):
        buffer += stream[at : at + step]
        got += take_frames(buffer)
    assert got == frames
    assert not buffer


def length_of(body: bytes) -> bytes:
    low, high = len(body) & 0x7F, len(body) >> 7
    return bytes([low | 0x80, high]) if high else bytes([low])
