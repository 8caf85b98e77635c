"""A disk that refuses bytes in the middle of an installation, and a clock in 1970: the node says so and serves on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.fleet import ask_http, image_json

NODE = "edge-2"
ROOM_BYTES = 200_000
MODEL_BYTES = 900_000


def serves(fleet) -> bool:
    """Whether the node itself reads a seven."""
    url = f"http://{fleet.address(NODE, 'http')}/v2/models/digits/versions/1/infer"
    said = ask_http(url, json.dumps(image_json(7)).encode())
    if said.status != 200 or said.headers["nc-served-by"] != NODE:
        return False
    scores = said.body["outputs"][0]["data"]
    return scores.index(max(scores)) == 7


@contextmanager
def full_disk(pid: int):
    """The kernel takes no byte beyond `ROOM_BYTES` of any file of the process: a full disk as its writes see it."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_a_release_is_staged(fleet):
    bundle, release = fleet.make_release(padding=MODEL_BYTES)
    agent = fleet.agent(NODE).pid
    with full_disk(agent):
        fleet.push(bundle, channel="stable", share=0.5)
        fleet.until_candidate(release, "edge-1", "router-1")
        fleet.until(lambda: fleet.agent(NODE).models["digits"].error, "a word about the disk")
        told = fleet.agent(NODE).models["digits"]
        assert "disk is full" in told.error
        assert "make room" in told.error
        assert f"digits release {release}" in told.error
        assert (told.stable, told.candidate, told.quarantined) == (1, None, ())
        assert serves(fleet)
        staged = fleet.mesh.data_dir / NODE / "models" / ".staging"
        assert [path for path in staged.rglob("*") if path.is_file()] == [], "partial files are removed"
        assert fleet.agent(NODE).pid == agent
    os.kill(agent, signal.SIGTERM)  # a new agent need not wait for the end of the pause
    fleet.until_candidate(release, NODE)
    assert fleet.agent(NODE).models["digits"].error == ""
    fleet.roll_back()
    fleet.until_candidate(None)


@pytest.fixture
def clock_1970(tmp_path):
    """A library that sets the clock of a process to 1970."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the library that sets a process's clock to 1970")
    library = tmp_path / "clock_1970.so"
    source = Path(__file__).with_name("clock_1970.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


def test_a_node_that_boots_in_1970(fleet, clock_1970, monkeypatch):
    bundle, release = fleet.make_release()
    fleet.kill(NODE, signal.SIGTERM)
    fleet.until_ended(NODE, 6.0)
    fleet.push(bundle, channel="stable", share=0.5)
    log = fleet.mesh.logs / f"{NODE}.log"
    read_before = log.stat().st_size
    with monkeypatch.context() as patched:
        patched.setenv("LD_PRELOAD", str(clock_1970))
        fleet.restart(NODE, routed=False)
    assert said_at(log, read_before).startswith("1970-01-01")
    fleet.until(lambda: serves(fleet), "an answer in 1970")
    # Signatures count against the latest time that the agent has seen, so it installs what is fresh.
    fleet.until_candidate(release, NODE)
    status = fleet.agent(NODE)
    assert not status.clock_ok
    assert "behind" in status.clock_note
    assert "Set the clock" in status.clock_note
    assert status.checked_at > time.time() - 7 * 86_400
    assert "set the clock" in log.read_text()[read_before:], "the controller's certificate is not valid yet"
    # Somebody sets the clock.
    fleet.kill(NODE, signal.SIGTERM)
    assert fleet.until_ended(NODE, 6.0) == 0
    fleet.restart(NODE)
    fleet.until(lambda: fleet.agent(NODE).clock_ok, "a clock that is right")
    fleet.roll_back()
    fleet.until_candidate(None)


def said_at(log: Path, begin: int) -> str:
    """The time of the first record after `begin`."""
    lines = log.read_bytes()[begin:].decode().splitlines()
    return next(json.loads(line)["timestamp"] for line in lines if line.startswith("{"))
