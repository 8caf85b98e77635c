"""A short life of a real node under `strace`: its ledger keeps every promise on every disk that a power cut leaves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.chaos_ledger import MUTANTS, first_fault_of, moments, replay
from benchmarks.chaos_recording import record
from benchmarks.crash_trace import Call, is_available
from benchmarks.memory import memory_folder

HAS_BROKER = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is not None
pytestmark = pytest.mark.skipif(not (is_available() and HAS_BROKER), reason="needs strace and mosquitto")
REQUESTS = 6


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def calls(home: Path) -> Sequence[Call]:
    return asyncio.run(record(home / "life", requests=REQUESTS, lives=1))


def test_what_was_acknowledged_is_on_every_disk(calls: Sequence[Call], home: Path) -> None:
    near = moments(calls)
    found = replay(calls, home / "image", per_position=1, near=near)
    assert not found.violations, found.examples
    assert found.unsynced == 0
    assert found.accepted > REQUESTS
    assert found.sends > 1
    assert found.images >= len(near) / 2


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_found_out(calls: Sequence[Call], home: Path, mistake: str) -> None:
    assert first_fault_of(mistake, calls, home / "mutant")
