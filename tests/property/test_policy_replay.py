"""P5: the same events and seed give the same decisions: from a log, from any checkpoint, and in another process."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accounting import Storm
from router.policy import Policy, PolicyConfig
from router.policy.log import FORMAT, Checkpoint, Record, Start, decode, encode
from router.policy.recorded import RecordedPolicy
from simulations.replay import replay

CONFIG = PolicyConfig(retry_burst=200.0, hedge_burst=200.0, brownout_share=1.0)
EVENTS = 1_000


class Memory:
    """Keeps every record; wants a checkpoint at every so many reports."""

    def __init__(self, seed: int, every: int) -> None:
        config = msgspec.msgpack.decode(msgspec.msgpack.encode(CONFIG))
        self.start = Start(FORMAT, "run", 0, 0, "here", "1", seed, config)
        self.records: list[Record] = [self.start]
        self.append = self.records.append
        self._every = every
        self._reports = 0

    def is_due(self, now: float) -> bool:
        self._reports += 1
        return self._reports % self._every == 0

    def begin(self, record: Checkpoint) -> None:
        self.records.append(record)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**40), every=st.integers(5, 40))
def test_a_log_replays_bit_for_bit(seed: int, every: int) -> None:
    memory = Memory(seed, every)
    storm = Storm(RecordedPolicy(CONFIG, seed, memory), seed)
    assert storm.run(EVENTS) == 0
    records = list(decode(encode(memory.records)))
    assert records == memory.records
    result = replay(records)
    assert result.identical, result.first
    assert result.skipped == 0
    assert result.decisions["decide"] == storm.events["send"]
    begins = [at for at, record in enumerate(records) if isinstance(record, Checkpoint)]
    middle = begins[len(begins) // 2]
    later = replay([msgspec.structs.replace(memory.start, number=1), *records[middle:]])
    assert later.identical, later.first
    assert later.records == sum(not isinstance(record, Checkpoint) for record in records[middle:])


def test_a_recorder_changes_no_decision() -> None:
    plain, recorded = Storm(Policy(CONFIG, 5), 5), Storm(RecordedPolicy(CONFIG, 5, Memory(5, 10**9)), 5)
    plain.run(EVENTS)
    recorded.run(EVENTS)
    assert plain.events == recorded.events


def test_every_call_that_changes_something_is_recorded() -> None:
    calls = {name: call for name, call in vars(Policy).items() if inspect.isfunction(call) and name[0] != "_"}
    timed = {name for name, call in calls.items() if "now" in inspect.signature(call).parameters}
    assert timed <= vars(RecordedPolicy).keys(), "whoever may change the policy takes `now` and belongs in the log"
    assert len(timed) >= 10


def digest() -> str:
    """Of everything that is decided in a storm."""
    memory = Memory(11, 10**9)
    Storm(RecordedPolicy(CONFIG, 11, memory), 11).run(EVENTS)
    return hashlib.sha256(encode(memory.records)).hexdigest()


def test_the_order_of_hashes_changes_no_decision() -> None:
    """Of sets and names: another process has another one."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert other.stdout == digest() + "\n"


if __name__ == "__main__":
    print(digest())
