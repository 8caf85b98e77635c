"""What it costs a router to know how 200 nodes are: polls, streams in which nothing changes, and streams of busy nodes.

The nodes are real mesh listeners over mTLS in another process. The figure is this process's CPU time, everything
included: sockets, TLS, decoding, the policy.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from benchmarks.rows import Row
from nearcast.identity import CertificateAuthority, load_identity, make_csr
from nearcast.load import NodeReport
from router.config import ProbeConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.targets import ChannelFactory, NodeView, TargetSet

TARGETS = 200
SECONDS, QUICK_SECONDS = 10.0, 3.0
START_TIMEOUT_S = 60.0
KINDS = {
    "polled": "older nodes, asked every report_ms",
    "idle": "a stream each, nothing changes",
    "busy": "a stream each, the load changes at every look",
}


class CountingPolicy(Policy):
    """Counts the reports that it takes."""

    reports = 0

    def on_report(self, now: float, name: str, report: NodeReport) -> None:
        """Take and count one."""
        self.reports += 1
        super().on_report(now, name, report)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one second."""

    cpu_ms: float
    reports: float
    oldest_ms: float


def run(*, quick: bool) -> list[Row]:
    """Measure each kind of nodes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        certify(root)
        for kind, note in KINDS.items():
            with nodes(root / "node", kind) as addresses:
                cost = uvloop.run(measure(root / "router", addresses, QUICK_SECONDS if quick else SECONDS))
            rows += [
                Row(f"reports.{kind}_cpu_ms_per_s", cost.cpu_ms, "ms", f"{TARGETS} targets, {note}"),
                Row(f"reports.{kind}_per_s", cost.reports, "1/s"),
                Row(f"reports.{kind}_cpu_us_each", cost.cpu_ms * 1e3 / max(cost.reports, 1.0), "us"),
                Row(f"reports.{kind}_oldest_ms", cost.oldest_ms, "ms", "age of the oldest report at the end"),
            ]
    return rows


def certify(root: Path) -> None:
    """One authority, one identity for all nodes, one for the router."""
    ca = CertificateAuthority.create(root / "ca")
    for name, role in (("node", "edge"), ("router", "router")):
        folder = root / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)


@contextmanager
def nodes(identity: Path, kind: str) -> Iterator[dict[str, str]]:
    """Their addresses by name."""
    command = [sys.executable, "-m", "benchmarks.reports_node", str(identity), str(TARGETS), kind]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        yield msgspec.json.decode(child.stdout.readline(), type=dict[str, str])
    finally:
        child.terminate()
        try:
            child.wait(5.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


async def measure(identity: Path, addresses: dict[str, str], seconds: float) -> Cost:
    """Follow all nodes for some time."""
    policy = CountingPolicy(PolicyConfig(), seed=1)
    router = Router(policy, node="router")
    targets = TargetSet(router, ChannelFactory("ngh2", load_identity(identity)), config=ProbeConfig())
    targets.update(NodeView(name=name, role="edge", address=address) for name, address in addresses.items())
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while len(policy.holders("model-0")) < len(addresses):
                await asyncio.sleep(0.1)
            await asyncio.sleep(2.0)  # until the round trips are measured and the streams are open
        began, cpu_s, reports = time.perf_counter(), time.process_time(), policy.reports
        await asyncio.sleep(seconds)
        lasted_s = time.perf_counter() - began
        oldest_s = max(router.now() - (target.reported_at or 0.0) for target in policy.targets)
        return Cost(
            (time.process_time() - cpu_s) / lasted_s * 1e3, (policy.reports - reports) / lasted_s, oldest_s * 1e3
        )
    finally:
        await targets.close()
        await router.close()
