"""A live router writes down what it decides; the simulator's copy of the policy must decide the same, bit for bit."""

from __future__ import annotations

import asyncio
import re
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path
from urllib.request import urlopen

from benchmarks.live_mesh import Answer, LiveMesh, drive
from benchmarks.rows import Row
from nearcast.handler import Served
from nearcast.load import NodeReport, VersionReport
from router.decision_log import SUFFIX
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send
from router.policy.log import Checkpoint, Record, encode
from router.policy.recorded import RecordedPolicy
from simulations.replay import ReplayResult, read, replay
from simulations.scenario import NodeSpec, Phase, Scenario

SECONDS, SECONDS_QUICK = 60.0, 10.0
SEED = 1
VICTIM = "near-b"
KILLS = ((0.25, 0.35), (0.45, 0.55), (0.65, 0.75))
"""When it is killed and when it is back, as shares of the run."""
COST_ROUNDS, COST_REQUESTS = 7, 20_000
SETTINGS = """
decisions = { enabled = true, file_bytes_max = 400000, files_max = 1000 }
policy = { hedge_share = 0.2 }
"""


def make_scenario(seconds: float) -> Scenario:
    """Two near nodes, one of them to be killed, and a far one; runs that stall, so that hedges pay."""
    node = {"slots": 2, "service_ms": 8.0, "stall_share": 0.03, "stall_ms": 120.0, "queue_max": 32}
    return Scenario(
        name="live-replay",
        title="A node that is killed",
        why="half loaded, so that two of three nodes can carry the load",
        duration_s=seconds,
        deadline_ms=300.0,
        nodes=(
            NodeSpec(name="near-a", tier="peer", rtt_ms=4.0, **node),  # type: ignore[arg-type]
            NodeSpec(name=VICTIM, tier="peer", rtt_ms=6.0, **node),  # type: ignore[arg-type]
            NodeSpec(name="far", tier="cloud", rtt_ms=24.0, **node),  # type: ignore[arg-type]
        ),
        load=(Phase(rate_rps=140.0), Phase(from_s=seconds * 0.8, rate_rps=260.0)),
    )


def run(*, quick: bool) -> list[Row]:
    """Run real processes, kill one and bring it back, replay the log; and what the log costs."""
    scenario = make_scenario(SECONDS_QUICK if quick else SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        with LiveMesh(Path(folder), scenario, SEED, settings=SETTINGS) as mesh:
            answers = _drive_with_a_kill(mesh, scenario)
            metrics = urlopen(f"http://{mesh.router['metrics']}/metrics").read().decode()
            if mesh.end_router():
                raise RuntimeError("the router did not end in peace")
            data_dir = mesh.data_dir
        paths = sorted((data_dir / "decisions").glob(f"*{SUFFIX}"))
        size_bytes = sum(path.stat().st_size for path in paths)
        began = time.process_time()
        result = replay(read(paths))
        replay_us = (time.process_time() - began) * 1e6 / max(1, result.records)
        middle = replay(read(paths[-1:]))
    lost = _metric(metrics, "nearcast_decision_log_lost_total")
    asked, codes = result.decisions.total(), Counter(answer.code or "answered" for answer in answers)
    calls = ", ".join(f"{count} {call}" for call, count in result.decisions.most_common())
    ends = ", ".join(f"{count} {code}" for code, count in codes.items())
    killed = f"sent; one of {len(scenario.nodes)} nodes was killed {len(KILLS)} times and came back"
    return [
        Row("replay.identical_share", _identical_share(result), "share", f"{calls}; first difference: {result.first}"),
        Row("replay.identical_share_later", _identical_share(middle), "share", f"from the last of {len(paths)} files"),
        Row("replay.decisions", asked, "1"),
        Row("replay.hedges", result.sends["hedge"], "1", "sent"),
        Row("replay.retries", result.sends["retry"], "1", killed),
        Row("replay.missing", lost + len(result.gaps) + result.skipped, "1", "records lost, gaps, records skipped"),
        Row("replay.answered_share", codes["answered"] / len(answers), "share", ends),
        Row("replay.bytes_per_request", size_bytes / len(answers), "B", "reports and hedges included"),
        Row("replay.replay_us", replay_us, "us", "a record"),
        *_measure_cost(quick=quick),
    ]


def _identical_share(result: ReplayResult) -> float:
    return 1.0 - result.different.total() / result.decisions.total()


def _drive_with_a_kill(mesh: LiveMesh, scenario: Scenario) -> list[Answer]:
    began = time.monotonic()

    def kill_and_start() -> None:
        """In turn: on a busy machine a start may take longer than planned."""
        for kill, back in KILLS:
            for share, call in ((kill, mesh.kill), (back, mesh.start)):
                time.sleep(max(0.0, began + share * scenario.duration_s - time.monotonic()))
                call(VICTIM)

    fate = threading.Thread(target=kill_and_start)
    fate.start()
    answers = asyncio.run(drive(mesh.router["grpc"], scenario, SEED))
    fate.join()
    return answers


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the router does not count {name}")
    return float(found[1])


def _measure_cost(*, quick: bool) -> list[Row]:
    """Processor time of decide, sent and reply with the recorder and without, in turn; and of making bytes of it."""
    plain, recorded, encoded = [], [], []
    for _ in range(3 if quick else COST_ROUNDS):
        kept = _Kept()
        plain.append(_request_us(_fill(Policy(PolicyConfig(), 1))))
        recorded.append(_request_us(_fill(RecordedPolicy(PolicyConfig(), 1, kept))))
        began = time.process_time()
        records = list(kept.records)
        for at in range(0, len(records), 256):
            encode(records[at : at + 256])
        encoded.append((time.process_time() - began) * 1e6 / (len(records) / 3))
    return [
        Row("replay.recorder_us", min(recorded) - min(plain), "us", "a request, three calls, on the loop's thread"),
        Row("replay.encode_us", min(encoded), "us", "a request, on the log's own thread"),
    ]


class _Kept:
    """Holds as many as a busy log does, before its thread has written them."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=3000)
        self.append = self.records.append

    def is_due(self, now: float) -> bool:
        return False

    def begin(self, record: Checkpoint) -> None:
        return


def _fill(policy: Policy) -> Policy:
    """Eight targets that hold the model, at rising distances."""
    for i in range(8):
        name = f"node-{i}"
        policy.add_target(0.0, name, "peer")
        version = VersionReport(model="digits", version="1", service_p50_us=800.0 + 40 * i, service_p95_us=2000.0)
        policy.on_report(0.0, name, NodeReport(node=name, role="edge", slots=4, versions=(version,)))
        policy.on_probe(0.0, name, 0.002 + 0.0004 * i)
    return policy


def _request_us(policy: Policy) -> float:
    facts = RequestFacts(model="digits", version="1", size_bytes=600, remaining_s=0.25)
    outcome = Outcome(served=Served(node="node-0", tier="peer", version="1", compute_us=900, queue_us=10, in_flight=2))
    began = time.process_time()
    for i in range(COST_REQUESTS):
        now = i * 1e-3
        send = policy.decide(now, facts)
        if isinstance(send, Send):
            policy.on_reply(now + 9e-4, policy.on_sent(now, facts, send), outcome)
    return (time.process_time() - began) * 1e6 / COST_REQUESTS
