"""Two tenants with two devices each, of the same names: nothing of one is ever heard by another. Judged by delivery."""

from __future__ import annotations

import pytest

from benchmarks.isolation_house import House
from benchmarks.isolation_ways import try_everything
from edge_node.broker.process import mosquitto_path


@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
async def test_nothing_of_a_device_reaches_another_by_any_way(tmp_path):
    async with House(tmp_path) as house:
        tally = await try_everything(house)
    assert tally.crossed == []
    assert tally.missing == []
    assert tally.ways > 300
