"""A candidate answers its share of the requests, and one command takes it back, while requests flow."""

from __future__ import annotations

import asyncio
import time
from math import sqrt

import pytest

from nearcast.cli.demo.samples import load_digits
from tests.e2e.fleet import Traffic, nearcast
from tests.e2e.ways import open_way

RATE_PER_S = 100.0
"""Through each of the two ways: 200 together."""
SHARE = 0.2
OBSERVED_S = 4.0
STANDARD_ERRORS = 4.0
ROLLBACK_S_MAX = 1.0
AFTER_S = 1.5


async def test_a_canary_gets_its_share_and_one_command_takes_it_back(fleet, figure):
    bundle, release = fleet.make_release("digits-2")
    disputed = load_digits().disputed
    async with (
        open_way("router", fleet, shown=disputed) as router,
        open_way("client", fleet, shown=disputed) as client,
        Traffic("router", router.ask, rate_per_s=RATE_PER_S) as through_router,
        Traffic("client", client.ask, rate_per_s=RATE_PER_S) as through_client,
    ):
        await asyncio.to_thread(fleet.push, bundle, channel="stable", share=SHARE)
        await asyncio.to_thread(fleet.until_candidate, release)
        mark = time.monotonic()
        await asyncio.sleep(OBSERVED_S)
        began = time.monotonic()
        run = await asyncio.to_thread(nearcast, "rollback", "digits", "--to", "1", home=fleet.operator)
        command_s = time.monotonic() - began
        await asyncio.sleep(max(0.0, began + AFTER_S - time.monotonic()))
        ended = time.monotonic()
    assert run.returncode == 0, run.stderr
    assert command_s <= ROLLBACK_S_MAX
    for traffic in (through_router, through_client):
        seen = [s for s in traffic.samples if s.answer and mark <= s.sent_at < began]
        judge_split(seen, str(release), figure, traffic.client)
        late = [s.done_at - began for s in traffic.samples if s.answer and s.answer.version == str(release)]
        figure(
            f"{traffic.client}: {len(traffic.failures)} of {len(traffic.samples)} failed; last answer of the candidate "
            f"{max(late):.3f} s after the start of the command, which took {command_s:.3f} s"
        )
        assert [s.error for s in traffic.failures] == []
        assert max(late) <= ROLLBACK_S_MAX
        assert sum(s.sent_at > began + max(late) for s in traffic.samples) >= RATE_PER_S * (ended - began - 1.0) * 0.8
    fleet.until_candidate(None)


def judge_split(seen, candidate, figure, way):
    """The share by version and by outputs is what was asked for, within the bounds of a binomial."""
    says = {v: {s.answer.says for s in seen if s.answer.version == v} for v in ("1", candidate)}
    assert len(says["1"]) == len(says[candidate]) == 1, says
    assert says["1"] != says[candidate]
    tolerance = STANDARD_ERRORS * sqrt(SHARE * (1 - SHARE) / len(seen))
    by_version = sum(s.answer.version == candidate for s in seen) / len(seen)
    by_output = sum({s.answer.says} == says[candidate] for s in seen) / len(seen)
    figure(f"{way}: {by_version:.1%} of {len(seen)} answers from the candidate, {by_output:.1%} by outputs")
    assert len(seen) >= RATE_PER_S * OBSERVED_S * 0.9
    assert by_version == pytest.approx(SHARE, abs=tolerance)
    assert by_output == by_version
