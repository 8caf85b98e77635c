"""The commands of docs/mqtt.md, run exactly as they are printed there: each client reads a seven."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_node.broker import find_broker

ROOT = Path(__file__).parents[2]
NODE_DEVICE = ROOT / ".venv-node-device"
GMQTT = ROOT / ".venv-gmqtt/bin/python"
TIMEOUT_S = 20.0
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(heading: str) -> list[str]:
    """The commands below a heading, up to the next one."""
    _, found, rest = (ROOT / "docs/mqtt.md").read_text().partition(f"\n{heading}")
    assert found, f"docs/mqtt.md has no {heading!r}"
    return _BLOCK.findall(re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0])


def run(fleet, folder: Path, heading: str, *, interpreter: Path = Path(sys.executable)) -> str:
    """What a reader sees who copies the commands: first those that all need, then those of one client."""
    address, picture = blocks("## Try it")
    assert address.split() == ["export", "BROKER=127.0.0.1", "PORT=1883"], "the only line that is not the reader's own"
    (command,) = blocks(heading)
    host, _, port = fleet.address("broker", "mqtt").rpartition(":")
    path = f"{interpreter.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "BROKER": host, "PORT": port}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", picture + command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mosquitto_rr(fleet, tmp_path):
    if shutil.which("mosquitto_rr") is None:
        pytest.skip("mosquitto_rr is not installed (apt-get install mosquitto-clients)")
    answer = json.loads(run(fleet, tmp_path, "### Shell, MQTT 5"))
    assert "outputs" in answer, answer
    scores = answer["outputs"][0]["data"]
    assert (len(scores), max(scores)) == (10, scores[7])


def test_npm_mqtt(fleet, tmp_path):
    if not (NODE_DEVICE / ".npm").exists():
        pytest.skip("the npm package mqtt is not installed (make node-client)")
    (tmp_path / "node_modules").symlink_to(NODE_DEVICE / "node_modules")
    assert run(fleet, tmp_path, "### Node.js, MQTT 5") == "It is a 7\n"


def test_gmqtt(fleet, tmp_path):
    if not GMQTT.exists():
        pytest.skip("gmqtt is not installed (make test installs it)")
    assert run(fleet, tmp_path, "### Python, MQTT 5", interpreter=GMQTT) == "It is a 7\n"


def test_our_client(fleet, tmp_path):
    assert run(fleet, tmp_path, "### Python, with our client") == "It is a 7\n"


def test_paho_with_mqtt_3_1_1(fleet, tmp_path):
    if find_broker() != "mosquitto":
        pytest.skip("the embedded broker speaks MQTT 5 only; mosquitto is not installed")
    assert run(fleet, tmp_path, "### Python, MQTT 3.1.1") == "200 It is a 7\n"


def test_every_block_of_commands_is_run():
    headings = re.findall(r"^### .*", (ROOT / "docs/mqtt.md").read_text(), re.MULTILINE)
    tested = ["### Shell, MQTT 5", "### Node.js, MQTT 5", "### Python, MQTT 5", "### Python, MQTT 3.1.1"]
    tested.append("### Python, with our client")
    assert [one for one in headings if blocks(one)] == [
        next(one for one in headings if one.startswith(start)) for start in tested
    ]
