"""Hedge delays: each rings once, in its millisecond, in the order of the instants, and none is forgotten."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from router.timers import Timers


class Loop:
    """A loop's clock and its one timer, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.most = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., None], *arguments: Any) -> Any:
        entry = (when, lambda: callback(*arguments))
        self.timers.append(entry)
        self.most = max(self.most, len(self.timers))

        class Handle:
            def cancel(_) -> None:
                if entry in self.timers:
                    self.timers.remove(entry)

        return Handle()

    def run_until(self, when: float) -> None:
        while self.timers and (entry := min(self.timers, key=lambda t: t[0]))[0] <= when:
            self.timers.remove(entry)
            self.now = max(self.now, entry[0])
            entry[1]()
        self.now = when


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def test_each_rings_once_within_a_millisecond_and_in_order(loop: Loop) -> None:
    timers, draw = Timers(), random.Random(3)
    rung: list[tuple[float, float]] = []

    def ring(when: float) -> None:
        rung.append((when, loop.now))
        if draw.random() < 0.3:
            later = loop.now + draw.uniform(0, 0.05)
            asked.append(later)
            timers.call_at(later, lambda: ring(later))

    asked: list[float] = []
    for _ in range(500):
        when = loop.now + draw.choice([0.0005, 0.02, draw.uniform(0, 0.3)])
        asked.append(when)
        timers.call_at(when, lambda when=when: ring(when))  # type: ignore[misc]
        loop.run_until(loop.now + draw.uniform(0, 0.002))
    loop.run_until(loop.now + 1.0)
    assert len(timers) == 0
    assert sorted(when for when, _ in rung) == sorted(asked)
    assert all(-1e-6 <= at - when <= 0.001 + 1e-6 for when, at in rung)
    assert [at for _, at in rung] == sorted(at for _, at in rung)
    assert loop.most == 1


def test_after_the_end_nothing_rings(loop: Loop) -> None:
    timers = Timers()
    timers.call_at(100.1, lambda: pytest.fail("rang after the end"))
    timers.close()
    loop.run_until(101.0)
    assert len(timers) == 0
    assert not loop.timers
