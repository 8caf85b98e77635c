"""After a crash nobody is blamed for what another did: requests and samples of streams are tried one at a time."""

from __future__ import annotations

import asyncio
import shutil

import numpy as np

from edge_node.mqtt.admission import Request, admit
from edge_node.mqtt.ledger.ledger import Ledger, boot_identity
from edge_node.mqtt.ledger.records import Input
from edge_node.mqtt.limits import LedgerLimits, MessageLimits
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.worker import MqttWorker
from nearcast.transport.mqtt.message import Message
from tests.integration.mqtt_parts import Doubler, until

X = np.ones((1, 2), dtype=np.float32).tobytes()
NOWHERE = 1


class Counting(Doubler):
    """Counts what runs at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.runs = 0

    async def infer(self, request, context):
        self.now += 1
        self.runs += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return await super().infer(request, context)


async def crashed_ledger(folder):
    """The file of a node that died with two requests and two samples of streams, all of which may have been running."""
    loop = asyncio.get_running_loop()
    ledger = Ledger(folder / "before" / "inbox.sqlite", boot=boot_identity(), limits=LedgerLimits())
    await ledger.open(loop.time())
    for number in range(2):
        topic = f"nc/v1/local/d{number}/up/infer/double"
        message = Message(topic=topic, payload=X, correlation=b"%d" % number)
        request = admit(message, loop.time(), MessageLimits(), nonce=b"")
        assert isinstance(request, Request)
        await ledger.accept(request, X)
        sample = Input(tenant="local", device=f"s{number}", stream="twice", arrived=loop.time())
        await ledger.take(sample, X)
    shutil.copytree(folder / "before", folder / "after")
    await ledger.close()
    return folder / "after" / "inbox.sqlite"


async def test_suspects_of_all_kinds_run_one_at_a_time(tmp_path):
    handler = Counting()
    worker = MqttWorker(
        handler,
        handler,
        node="n1",
        host="127.0.0.1",
        port=NOWHERE,
        inbox=await crashed_ledger(tmp_path),
        streams=(StreamDefinition(name="twice", model="double"),),
    )
    await worker.start()
    try:
        await until(lambda: handler.runs == 4 and not handler.now)
    finally:
        await worker.drain(0.0)
    assert handler.most == 1
