from __future__ import annotations

import logging

import pytest
from prometheus_client import Counter, generate_latest

from nearcast.metrics import LateRegistry


class Broken:
    def collect(self):
        raise ZeroDivisionError


def test_a_collector_that_cannot_be_registered_is_named_once_and_hides_no_other(caplog: pytest.LogCaptureFixture):
    registry, broken = LateRegistry(), Broken()
    twice = [Counter("twice", "One name.", registry=None) for _ in range(2)]
    last = Counter("last", "Comes last.", registry=None)
    for collector in (broken, *twice, last):
        registry.register(collector)
    for _ in range(2):
        text = generate_latest(registry.made()).decode()
        assert all(name in text for name in ("twice_total", "last_total", "python_info"))
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "test_late_registry.Broken" in caplog.text
    assert "prometheus_client.metrics.Counter" in caplog.text
    # Whoever registered them need not know.
    for collector in (broken, *twice, last):
        registry.unregister(collector)
    assert "last_total" not in generate_latest(registry.made()).decode()
