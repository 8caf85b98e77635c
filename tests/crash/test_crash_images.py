"""A short life of a real agent, cut at its system calls: every image boots well, and mistakes are found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.crash_explore import Plan, explore
from benchmarks.crash_mutants import MUTANTS, first_fault_of
from benchmarks.crash_scenario import Recording, short_life, stage
from benchmarks.crash_trace import is_available
from benchmarks.memory import memory_folder

pytestmark = pytest.mark.skipif(not is_available(), reason="strace cannot trace processes here")
MISTAKES = (
    "the pointer's folder is not synced",
    "the metadata is not synced",
    "the pointer is written before the journal",
)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def recording(home: Path) -> Recording:
    with stage(home / "life") as life:
        return short_life(life)


def test_every_image_boots_and_keeps_its_promises(recording: Recording, home: Path) -> None:
    found = explore(recording, Plan(images=120, per_point=4, fetching=1), home / "image")
    assert not found.violations, found.examples
    assert found.judged >= 120
    assert {"C1", "C2", "C3", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12"} <= set(found.points)
    assert found.fetching == 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_out(recording: Recording, home: Path, mistake: str) -> None:
    assert mistake in MUTANTS
    assert first_fault_of(mistake, recording, home / "mutant")
