from __future__ import annotations

import logging

from nearcast.telemetry import EVENTS_MAX, LIKE_EVENTS_MAX, LIKE_EVENTS_S, Repetition


def record(message: object, name: str = "a") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, (), None)


def test_the_same_event_passes_so_often_and_again_later(caplog) -> None:
    now = [100.0]
    found = Repetition(lambda: now[0])
    assert sum(found.filter(record("bad request %s")) for _ in range(10_000)) == LIKE_EVENTS_MAX
    assert found.filter(record("another"))
    assert found.filter(record("bad request %s", "b"))
    now[0] += LIKE_EVENTS_S
    assert found.filter(record({"event": "bad request %s"}))
    assert [r.getMessage() for r in caplog.records] == [f"left out {10_000 - LIKE_EVENTS_MAX} like events"]


def test_invented_events_fill_no_memory() -> None:
    found = Repetition(lambda: 0.0)
    for index in range(3 * EVENTS_MAX):
        found.filter(record({"event": f"invented {index}"}))
    assert len(found._counts) <= EVENTS_MAX
