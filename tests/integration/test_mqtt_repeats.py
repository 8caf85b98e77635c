"""An answer that may have been sent before says so, whether the link, the node or its power had failed meanwhile."""

from __future__ import annotations

import asyncio
import queue

import numpy as np
import pytest

from benchmarks.chaos_proxy import Proxy
from benchmarks.chaos_wire import PUBACK
from tests.integration.mqtt_parts import Device, Doubler, serving, user_of

X = np.ones((1, 2), dtype=np.float32).tobytes()


class Deaf:
    """A link on which the node does not hear that the broker has what it said."""

    def __init__(self) -> None:
        self.is_deaf = True
        self.sessions = set()

    def watch(self, session, is_client, frame):
        self.sessions.add(session)
        return b"" if self.is_deaf and not is_client and frame[0] >> 4 == PUBACK else frame


@pytest.mark.parametrize("boot", [None, "another boot"])
async def test_what_is_sent_again_says_so(broker, tmp_path, boot):
    link, handler, successor = Deaf(), Doubler(), Doubler()
    async with Proxy(broker.port, link.watch) as proxy:
        with Device(broker.port, "d1") as device:
            async with serving(proxy.port, tmp_path, handler, drain_s=0.0):
                correlation = device.ask(X)
                answers = [await device.answer()]
                for session in list(link.sessions):
                    session.end()
                answers.append(await device.answer())
            link.is_deaf = False
            async with serving(proxy.port, tmp_path, successor, boot=boot):
                answers.append(await device.answer())
                fresh = device.ask(2 * X)
                last = await device.answer()
            async with serving(proxy.port, tmp_path, successor, boot=boot):
                with pytest.raises(queue.Empty):  # the broker has confirmed all of it
                    await asyncio.to_thread(device.reply, 0.15)
    assert [user_of(answer).get("dedup") for answer in answers] == [None, "1", "1"]
    assert {answer.properties.CorrelationData for answer in answers} == {correlation}
    assert len({answer.payload for answer in answers}) == 1
    assert len(handler.executed) == 1
    assert (last.properties.CorrelationData, user_of(last).get("dedup")) == (fresh, None)
    assert len(successor.executed) == 1
