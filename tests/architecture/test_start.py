"""What a node loads before it is ready: nothing that only some nodes need."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

LATE = (
    "aiohttp",
    "cryptography",
    "edge_node.devices",
    "grpc",
    "mqtt5",
    "onnxruntime",
    "prometheus_client",
    "sqlite3",
    "yarl",
)
"""Of HTTP, of nodes with certificates, of devices, of the other transport, of models, of those who read metrics."""


def test_a_node_without_models_and_devices_is_ready_before_it_loads_what_serves_them(tmp_path: Path) -> None:
    settings = {"data_dir": str(tmp_path), "mqtt.broker": ""} | dict.fromkeys(
        ("listen.grpc", "listen.http", "listen.metrics"), "127.0.0.1:0"
    )
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    log = tmp_path / "imports"
    with log.open("w") as stderr:
        command = [sys.executable, "-X", "importtime", "-m", "nearcast", "edge", *pairs]
        node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        try:
            assert node.stdout is not None
            addresses = json.loads(node.stdout.readline())
            assert imported(log) == set()
            with urllib.request.urlopen(f"http://{addresses['metrics']}/metrics", timeout=60.0) as answer:
                assert b"process_resident_memory_bytes" in answer.read()
            with urllib.request.urlopen(f"http://{addresses['http']}/v2", timeout=60.0) as answer:
                assert json.load(answer)["name"] == addresses["ready"]
            assert "aiohttp" in imported(log)
        finally:
            node.terminate()
            node.communicate(timeout=20)


def imported(log: Path) -> set[str]:
    """Those of `LATE` that `-X importtime` has named so far, or a module of theirs."""
    lines = log.read_text().splitlines()
    names = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    return {late for late in LATE for name in names if f"{name}.".startswith(f"{late}.")}
