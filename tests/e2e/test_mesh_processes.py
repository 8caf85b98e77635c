"""A whole mesh as one process tree: it comes up by invitation, survives a killed node, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nearcast.cli.processes import Mesh, MeshConfig
from nearcast.errors import Code, MeshError

pytestmark = pytest.mark.skipif(not Path("/usr/sbin/mosquitto").exists(), reason="mosquitto is not installed")
WAIT_S = 60.0


def processes_of(folder: Path) -> list[str]:
    """Command lines of all living processes that name a folder."""
    out = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command:
                out.append(command.replace(b"\0", b" ").decode())
    return out


async def none_left(folder: Path) -> bool:
    for _ in range(500):
        if not processes_of(folder):
            return True
        await asyncio.sleep(0.01)
    return False


async def nodes(mesh: Mesh) -> dict[str, dict]:
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "nearcast", "nodes", "list", "--json"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
        env={**os.environ, "NEARCAST_HOME": str(mesh.operator_home)},
    )
    return {node["name"]: node for node in json.loads(run.stdout)["nodes"]}


async def test_a_mesh_comes_up_joins_restarts_and_goes(tmp_path):
    folder = tmp_path / "mesh"
    mesh = await Mesh.start(folder, edges=1, cloud=1, router=1)
    try:
        assert set(mesh.addresses) == {"sync", "broker", "cloud-1", "edge-1", "router-1"}
        assert mesh.addresses["edge-1"]["mqtt"] == mesh.addresses["broker"]["mqtt"]
        known = await nodes(mesh)
        for name, role in (("cloud-1", "cloud"), ("edge-1", "edge"), ("router-1", "router")):
            assert known[name]["role"] == role
            assert known[name]["addresses"]["mesh"] == mesh.addresses[name]["mesh"]
        before, pid = dict(mesh.addresses["edge-1"]), mesh.pid("edge-1")
        mesh.kill("edge-1", signal.SIGKILL)
        await mesh.restart("edge-1")
        assert mesh.pid("edge-1") != pid
        assert mesh.addresses["edge-1"] == before
        mesh.kill("broker", signal.SIGKILL)
        await mesh.restart("broker")
        assert mesh.is_running("broker")
        with pytest.raises(MeshError) as refused:
            mesh.kill("edge-9")
        assert "edge-1" in refused.value.message
        inside = processes_of(folder)
        assert sum("model_sync.agent" in command for command in inside) == 3
    finally:
        await mesh.stop()
    assert await none_left(folder)
    again = await Mesh.start(folder, edges=1, cloud=0, router=0)  # the identities are there: nobody joins twice
    await again.stop()
    assert await none_left(folder)


async def test_a_mesh_that_cannot_come_up_says_why_and_leaves_nothing(tmp_path):
    folder = tmp_path / "mesh"
    config = MeshConfig(edges=1, cloud=0, router=0, first_ports=False, edge_settings=("nonsense.key=1",))
    with pytest.raises(MeshError) as refused:
        await Mesh.start(folder, config=config)
    assert refused.value.code is Code.UNAVAILABLE
    assert "edge-1" in refused.value.message
    assert "nonsense" in refused.value.message
    assert await none_left(folder)


def test_up_ends_everything_on_ctrl_c(tmp_path):
    folder = tmp_path / "mesh"
    pairs = [f"data_dir={folder}", "first_ports=false", "cloud=0", "router=0", "edges=1"]
    command = [sys.executable, "-m", "nearcast", "up", "--json", *(part for pair in pairs for part in ("--set", pair))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    text = ""
    while not text.rstrip().endswith("}\n}") and (line := process.stdout.readline()):
        text += line
    assert "edge-1" in json.loads(text)["addresses"]
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 0
    process.stdout.close()
    assert asyncio.run(none_left(folder))
