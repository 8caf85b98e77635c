"""What several files of tests share: servers under attack are made once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.abuse_parts import Bench, bench


@pytest.fixture(scope="session")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Listeners that give up whoever is slow."""
    with bench(tmp_path_factory.mktemp("abuse")) as made:
        yield made


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Listeners that wait for whoever is slow: what is refused there is refused for want of room."""
    waits = {"handshake_timeout_s": 60.0, "upload_timeout_s": 60.0, "stall_timeout_s": 60.0}
    with bench(tmp_path_factory.mktemp("patient"), **waits) as made:
        yield made
