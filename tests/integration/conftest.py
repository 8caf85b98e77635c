"""What several files of tests share: processes that serve are started once for all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from edge_node.broker import Broker
    from tests.integration.abuse_parts import Bench
    from tests.integration.sync_parts import Sync


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    """A Mosquitto of the test's own, which may be killed."""
    from edge_node.broker import Broker
    from edge_node.broker.process import mosquitto_path

    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    started = await Broker.start(tmp_path / "broker", kind="mosquitto")
    yield started
    await started.stop()


@pytest.fixture(scope="session")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Listeners that give up whoever is slow."""
    from tests.integration.abuse_parts import bench

    with bench(tmp_path_factory.mktemp("abuse")) as made:
        yield made


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Listeners that wait for whoever is slow: what is refused there is refused for want of room."""
    from tests.integration.abuse_parts import bench

    waits = {"handshake_timeout_s": 60.0, "upload_timeout_s": 60.0, "stall_timeout_s": 60.0}
    with bench(tmp_path_factory.mktemp("patient"), **waits) as made:
        yield made


@pytest.fixture(scope="session")
def sync(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sync]:
    """One sync process for all tests that do not stop it; they use names of their own."""
    from tests.integration.sync_parts import Sync

    running = Sync(tmp_path_factory.mktemp("mesh"))
    yield running
    assert running.stop() == 0
