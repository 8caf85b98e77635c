"""The agent as a real process: killed where it hurts, started again, and against the real sync process over TLS."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_sync.agent.config import AgentConfig
from model_sync.agent.status import AgentStatus, read_status
from nearcast.store import Store
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, serving

WAIT_S = 30.0


class AgentProcess:
    """`python -m model_sync.agent` on a configuration file."""

    def __init__(self, config: AgentConfig, folder: Path) -> None:
        self.store = Path(config.store)
        path = folder / "agent.toml"
        path.write_text(
            "".join(
                f"{key} = {json.dumps(getattr(config, key))}\n"
                for key in ("repository", "control", "identity", "store", "poll_s", "probation_s", "hint_wait_s")
            )
            + "[limits]\nbackoff_base_s = 0.05\nbackoff_cap_s = 0.2\n"
        )
        command = [sys.executable, "-m", "model_sync.agent", "--config", str(path), "--set", "log_level=error"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ready(self) -> dict[str, str]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def status(self) -> AgentStatus | None:
        status = read_status(self.store)
        return status if status is not None and status.pid == self.process.pid else None

    def wait_for(self, what: str, *states: str, stable: int | None = None) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            status = self.status()
            model = status.models.get(MODEL) if status is not None else None
            if model is not None and model.state in states and (stable is None or model.stable == stable):
                return
            assert self.process.poll() is None, f"the agent ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{what}: {status}"
            time.sleep(0.002)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "home")
    made.push(1)
    made.roll(1)
    return made


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


def require_sound(folder: Path, allowed: set[int]) -> None:
    """I2: whatever happened, the pointer names whole releases, and only those that may run."""
    store = Store(folder)
    pointer = store.pointer(MODEL)
    assert pointer is not None
    assert pointer.stable in allowed
    for release in (pointer.stable, pointer.last_good, pointer.candidate):
        if release is not None:
            for entry in store.manifest(MODEL, release).files:
                data = (store.folder(MODEL, release) / entry.path).read_bytes()
                assert hashlib.sha256(data).hexdigest() == entry.sha256


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kill_minus_nine_at_each_state(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin, probation_s=1.0)
    agent = AgentProcess(config, tmp_path)
    assert agent.ready()["ready"] == "agent"
    agent.wait_for("release 1 is installed", "IDLE", stable=1)
    assert agent.end(signal.SIGTERM) == 0
    publisher.push(2, scale=5.0, padding=3_000_000)
    publisher.roll(2)

    def slowly(handler: object, path: str, data: bytes) -> bool:
        if "/blobs/" in path and len(data) > 1_000_000:
            time.sleep(0.3)
        return False

    origin.fault = slowly
    for state, allowed in (("FETCH", {1}), ("GATE", {1}), ("PROBATION", {2})):
        agent = AgentProcess(config, tmp_path)
        agent.ready()
        agent.wait_for(f"it is in {state}", state)
        assert agent.end(signal.SIGKILL) == -signal.SIGKILL
        require_sound(config_store(config), allowed)
    agent = AgentProcess(config, tmp_path)
    agent.ready()
    agent.wait_for("release 2 is committed", "IDLE", stable=2)
    assert agent.end(signal.SIGTERM) == 0
    require_sound(config_store(config), {2})
    fetched = [path for path, start, _ in origin.served if "/blobs/" in path and not start]
    assert len(fetched) - len(set(fetched)) <= 1, "only what was cut before its first chunk began anew"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_three_boots_in_probation_go_back(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    quick, patient = (make_config(tmp_path, publisher, origin, probation_s=span) for span in (0.1, 20.0))
    agent = AgentProcess(quick, tmp_path)
    agent.wait_for("release 1 is installed", "IDLE", stable=1)
    agent.end(signal.SIGKILL)
    publisher.push(2)
    publisher.roll(2)
    for _ in range(3):
        agent = AgentProcess(patient, tmp_path)
        agent.ready()
        agent.wait_for("release 2 is on probation", "PROBATION", stable=2)
        agent.end(signal.SIGKILL)
        require_sound(config_store(quick), {2})
    agent = AgentProcess(patient, tmp_path)
    agent.ready()
    agent.wait_for("release 1 is back", "IDLE", stable=1)
    status = agent.status()
    assert status is not None
    assert status.models[MODEL].quarantined == (2,)
    assert agent.end(signal.SIGTERM) == 0
    require_sound(config_store(quick), {1})


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_orderly_restarts_in_probation_are_no_sign_against_a_release(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, probation_s=20.0)
    for _ in range(4):
        agent = AgentProcess(config, tmp_path)
        agent.ready()
        agent.wait_for("release 1 is on probation", "PROBATION", stable=1)
        assert agent.end(signal.SIGTERM) == 0
    require_sound(config_store(config), {1})


def test_the_agent_ends_with_its_parent(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin)
    (tmp_path / "agent.toml").write_text(
        f"repository = {json.dumps(config.repository)}\nidentity = {json.dumps(config.identity)}\n"
        f"store = {json.dumps(config.store)}\n"
    )
    code = (
        "import subprocess, sys, time; "
        f"a = [sys.executable, '-m', 'model_sync.agent', '--config', {str(tmp_path / 'agent.toml')!r}]; "
        "c = subprocess.Popen(a, stdout=subprocess.PIPE, text=True); c.stdout.readline(); "
        "print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "an orphan goes on"
        time.sleep(0.05)


def config_store(config: AgentConfig) -> Path:
    return Path(config.store)


def test_unknown_settings_end_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('nod = "edge-1"\n')
    command = [sys.executable, "-m", "model_sync.agent", "--config", str(tmp_path / "agent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    assert "nod" in done.stderr
    assert "Traceback" not in done.stderr


def test_niceness_and_memory(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    agent = AgentProcess(make_config(tmp_path, publisher, origin, probation_s=0.1), tmp_path)
    agent.ready()
    agent.wait_for("release 1 is installed", "IDLE", stable=1)
    assert os.getpriority(os.PRIO_PROCESS, agent.process.pid) >= 10
    lines = Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
    rss_mb = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    assert agent.end(signal.SIGTERM) == 0
    print(f"agent RSS {rss_mb:.0f} MB")
    assert rss_mb < 120
