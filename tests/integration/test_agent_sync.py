"""The agent against the real sync process: enrolment, mTLS, push, trial, rollback by hint, and its absence."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_sync.agent.config import AgentConfig, AgentLimits
from model_sync.publisher.control_client import connect
from model_sync.publisher.keys import init_keys
from model_sync.publisher.push import push
from nearcast.identity import join
from nearcast.store import Pointer, Store
from tests.integration.agent_parts import MODEL, running, settled, status_of
from tests.patience import until
from tests.tiny_models import affine_model, write_version

READY_S = 20.0


class Sync:
    """A mesh's home, its sync process, and a node that has joined."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        init_keys(self.home)
        self.start()
        with connect(self.home) as client:
            token = client.call("POST", "/v1/invites", {"name": "edge-1", "role": "edge", "ttl_s": 60.0})["token"]
        self.identity = folder / "identity"
        join(str(token), self.identity)
        self.folder = folder

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "nearcast",
            "sync",
            "--home",
            str(self.home / "sync"),
            "--set=telemetry.level=error",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], READY_S)[0], "the sync process did not get ready"
        self.url = json.loads(self.process.stdout.readline())["control"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(READY_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def push(self, release: int) -> None:
        x = np.ones((1, 4), np.float32)
        bundle = self.folder / f"bundle-{release}"
        golden = (({"x": x}, {"y": x * np.float32(release)}),)
        write_version(bundle, affine_model(float(release)), name=MODEL, release=release, golden=golden)
        with connect(self.home) as client:
            push(bundle, client, self.home / "operator", channel="stable", share=0.3)

    def roll(self, action: str, **fields: Any) -> None:
        with connect(self.home) as client:
            client.call("POST", "/v1/rollouts", {"channel": "stable", "model": MODEL, "action": action, **fields})


@pytest.fixture
def sync(tmp_path: Path) -> Iterator[Sync]:
    started = Sync(tmp_path)
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.mark.timeout(120)
async def test_push_trial_promotion_and_rollback_by_hint(sync: Sync, tmp_path: Path) -> None:
    sync.push(1)
    config = AgentConfig(
        node="edge-1",
        control=sync.url,
        identity=str(sync.identity),
        store=str(tmp_path / "store"),
        poll_s=600.0,
        probation_s=0.2,
        limits=AgentLimits(backoff_base_s=0.05, backoff_cap_s=0.2),
    )
    store = Store(tmp_path / "store")

    def pointer() -> Pointer:
        return store.pointer(MODEL) or Pointer()

    async with running(config) as agent:
        await settled(agent, stable=1)
        sync.push(2)
        await settled(agent, stable=1, candidate=2)
        assert pointer().share == 0.3
        sync.roll("promote")
        await settled(agent, stable=2)
        sync.push(3)
        sync.roll("promote")
        await settled(agent, stable=3)
        began = time.monotonic()
        sync.roll("rollback", release=2)
        answered = time.monotonic()
        await until(lambda: pointer().stable == 2, "the rollback arrives")
        print(f"rollback: {(time.monotonic() - answered) * 1e3:.0f} ms after the answer of the controller")
        assert time.monotonic() - began < 5.0
        await settled(agent, stable=2)
        assert pointer().last_good == 3
        sync.roll("stable", release=3)
        await settled(agent, stable=3)
        sync.stop()
        assert not await agent.check()
        assert status_of(agent).stable == 3
        assert "The node serves on" in agent._status.error
