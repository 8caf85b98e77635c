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
    "nearcast.transport.rest_app",
    "onnxruntime",
    "prometheus_client",
    "sqlite3",
    "yarl",
)
"""Of HTTP, of nodes with certificates, of devices, of the other transport, of models, of those who read metrics."""
LIST_DATACLASSES = """
import dataclasses, sys
import edge_node.app, nearcast.serving.engines.onnxruntime, nearcast.transport.ngh2_server
ours = ("edge_node.", "nearcast.", "router.")
modules = [module for name, module in sys.modules.items() if name.startswith(ours)]
classes = {each for module in modules for each in vars(module).values() if dataclasses.is_dataclass(each)}
print(*sorted(f"{each.__module__}.{each.__qualname__}" for each in classes if each.__module__.startswith(ours)))
"""


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


def test_the_records_that_every_node_defines_are_structs() -> None:
    """A frozen dataclass takes 0.5 ms to define, because it compiles its methods; a Struct takes a fortieth of that."""
    found = subprocess.run([sys.executable, "-c", LIST_DATACLASSES], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["nearcast.identity.node.Identity"], "it alone has a field that nobody gives it"


def imported(log: Path) -> set[str]:
    """Those of `LATE` that `-X importtime` has named so far, or a module of theirs."""
    lines = log.read_text().splitlines()
    names = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    return {late for late in LATE for name in names if f"{name}.".startswith(f"{late}.")}
