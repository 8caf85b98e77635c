"""A real agent, killed at the system call that ends a state and started again; the benchmark does all twelve."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash_kills import kill_everywhere
from benchmarks.crash_scenario import stage
from benchmarks.crash_trace import is_available

POINTS = ("C7", "C12")


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="strace cannot trace processes here")
def test_killed_between_two_states(tmp_path: Path) -> None:
    with stage(tmp_path / "kills") as scene:
        killed = kill_everywhere(scene, kills=1, points=POINTS, updates=1)
    assert [(one.point, one.kills) for one in killed] == [(point, 1) for point in POINTS]
    assert not [fault for one in killed for fault in one.violations]
