"""One mesh for the whole session: broker, sync, a cloud core, two edge nodes, a router; real processes, real models."""

from __future__ import annotations

from pathlib import Path

import pytest

TIMEOUT_S = 240
"""Of each test here, the mesh's start included: dozens of processes on a machine that may be slow."""
FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory):
    from tests.e2e.fleet import Fleet

    fleet = Fleet(tmp_path_factory.mktemp("mesh"))
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(autouse=True)
def no_trial_is_left(request):
    """A test that fails in the middle of a trial does not fail the next one."""
    yield
    if "fleet" in request.fixturenames:
        request.getfixturevalue("fleet").end_trial()


@pytest.fixture
def figure(request):
    """Call it with what was measured; it is printed at the end of the run."""
    lines = request.config.stash.setdefault(FIGURES, [])
    return lambda text: lines.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("measured on the mesh", sep="-")
        for line in lines:
            terminalreporter.write_line(line)
