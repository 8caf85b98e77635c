"""`python -m benchmarks.outage_reader PORT FIRST LAST`: reads the backlog upstream, with a session that survives.

Waits for the broker. Prints a line when the first message is there, and what it saw when every number from FIRST to
LAST was. A process of its own, so that reading the backlog takes no time from measuring who is live.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
import time
from collections import defaultdict

import uvloop

from benchmarks.outage_node import DEVICES, STREAM
from nearcast.errors import MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

SESSION_S = 3600
SEQ = re.compile(rb'"seq":(\d+)')


async def main() -> None:
    port, first, last = (int(text) for text in sys.argv[1:4])
    seen: dict[str, list[int]] = defaultdict(list)
    missing = set(range(first, last + 1))
    times: list[float] = []
    sizes: list[int] = []
    done = asyncio.Event()
    os.nice(5)  # who is measured goes before who only reads

    def receive(message: Message) -> None:
        connection.acknowledge(message)
        found = SEQ.search(message.payload)
        assert found is not None
        number = int(found[1])
        seen[message.topic].append(number)
        if number in missing:
            if not times:
                print(json.dumps({"began": number}), flush=True)
            missing.discard(number)
            times.append(time.perf_counter())
            sizes.append(len(message.payload))
        if not missing:
            done.set()

    settings = ConnectionSettings(host="127.0.0.1", port=port, client_id="reader", session_expiry_s=SESSION_S)
    while True:
        connection = Connection(settings, on_message=receive)
        try:
            await connection.open()
        except MeshError:
            await asyncio.sleep(0.02)
        else:
            break
    await connection.subscribe(*(f"nc/v1/local/d{number}/out/{STREAM.name}" for number in range(DEVICES)))
    if not missing:
        done.set()
    await done.wait()
    firsts = [list(dict.fromkeys(numbers)) for numbers in seen.values()]  # a repeat counts where it came first
    report = {
        "seconds": times[-1] - times[0] if times else 0.0,
        "repeated": sum(len(numbers) - len(set(numbers)) for numbers in seen.values()),
        "out_of_order": sum(later < earlier for each in firsts for earlier, later in itertools.pairwise(each)),
        "mean_bytes": sum(sizes) / len(sizes) if sizes else 0.0,
    }
    await connection.close()
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
