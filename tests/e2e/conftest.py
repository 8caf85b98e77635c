"""One mesh for the whole session: broker, sync, a cloud core, two edge nodes, a router; real processes, real models."""

from __future__ import annotations

import pytest

@pytest.fixture(scope="session")
def fleet(tmp_path_factory):
    from tests.e2e.fleet import Fleet

    fleet = Fleet(tmp_path_factory.mktemp("mesh"))
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()
