"""Joining and leaving: a token never stands in a command line, and who was removed is not answered any more."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from model_sync.publisher.control_client import connect
from nearcast.cli.processes import Mesh
from nearcast.errors import Code, MeshError
from nearcast.identity import load_identity
from nearcast.transport.grpc import make_channel
from nearcast.transport.mesh import REPORT

WAIT_S = 60.0
TOKEN_START = b"eyJ"  # base64 of a JSON object


def command_line(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


async def test_no_token_stands_in_a_command_line(tmp_path: Path) -> None:
    mesh = await Mesh.start(tmp_path, edges=1, cloud=1, router=1)
    try:
        for name in ("cloud-1", "edge-1", "router-1"):
            words = command_line(mesh.pid(name))
            assert words[words.index(b"--join") + 1] == b"-"
            assert not [word for word in words if word.startswith(TOKEN_START)]
            assert load_identity(mesh.data_dir / name / "identity").name == name
        with connect(mesh.operator_home) as client:
            token = client.call("POST", "/v1/invites", {"name": "edge-9", "role": "edge", "ttl_s": 60})["token"]
        (tmp_path / "token").write_text(token + "\n")
        listen = [f"--set=listen.{kind}=127.0.0.1:0" for kind in ("grpc", "http", "metrics")]
        node = [sys.executable, "-m", "nearcast", "edge", f"--set=data_dir={tmp_path}/edge-9", *listen]
        for _ in range(2):  # the second time it has an identity, and the token is used up
            process = subprocess.Popen([*node, "--join", f"@{tmp_path}/token"], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            assert '"ready": "edge-9"' in process.stdout.readline()
            process.terminate()
            process.communicate(timeout=WAIT_S)
            (tmp_path / "token").unlink(missing_ok=True)
    finally:
        await mesh.stop()


async def test_a_removed_node_is_refused_by_the_others(tmp_path: Path) -> None:
    mesh = await Mesh.start(tmp_path, edges=0, cloud=2, router=1)
    channels = {}
    try:
        removed = load_identity(mesh.data_dir / "cloud-2" / "identity")
        for name in ("cloud-1", "router-1"):
            channels[name] = make_channel("ngh2", mesh.addresses[name]["mesh"], identity=removed)
            await channels[name].unary(REPORT, (b"",))
        with connect(mesh.operator_home) as client:
            client.call("DELETE", "/v1/nodes/cloud-2")
        ends_at = time.monotonic() + WAIT_S
        for channel in channels.values():
            code = None
            while code is None and time.monotonic() < ends_at:
                try:
                    await channel.unary(REPORT, (b"",))
                    await asyncio.sleep(0.1)
                except MeshError as error:
                    code = error.code
                    assert "removed from the mesh" in error.message
            assert code is Code.FORBIDDEN
    finally:
        for channel in channels.values():
            await channel.close()
        await mesh.stop()
