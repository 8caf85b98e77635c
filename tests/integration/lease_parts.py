"""A small mesh of processes for tests of leases: nodes with a mesh and a client listener, and a router."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nearcast.identity import CertificateAuthority, make_csr

ROOT = Path(__file__).parents[2]
NODE_FILE = Path(__file__).with_name("router_node.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def make_identities(root: Path, roles: Mapping[str, str]) -> None:
    """A folder for each name with what enrolment would put there."""
    ca = CertificateAuthority.create(root / "ca")
    for name, role in roles.items():
        folder = root / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)


class LeaseMesh:
    """What a test may hurt: the processes, by name, and their addresses."""

    def __init__(self) -> None:
        self.children: dict[str, subprocess.Popen[str]] = {}
        self.said: dict[str, dict[str, Any]] = {}

    @property
    def address(self) -> str:
        """The router's client listener."""
        return str(self.said["r"]["grpc"])

    def start(self, name: str, *command: object) -> None:
        """Start a Python process."""
        self.children[name] = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def wait_ready(self, name: str) -> None:
        """Until it has said where it listens."""
        stdout = self.children[name].stdout
        assert stdout is not None
        line = stdout.readline()
        assert line, f"{name} ended with {self.children[name].wait()}"
        self.said[name] = json.loads(line)

    def kill(self, name: str) -> None:
        """As a power cut would."""
        self.children[name].kill()


@contextmanager
def lease_mesh(root: Path, *, nodes: int, delay_ms: float = 5.0) -> Iterator[LeaseMesh]:
    """A router `r` with fixed targets n0, n1, ..., each of which runs the model `digits` in `delay_ms`."""
    names = [f"n{number}" for number in range(nodes)]
    make_identities(root, {**dict.fromkeys(names, "edge"), "r": "router"})
    mesh = LeaseMesh()
    try:
        for name in names:
            mesh.start(name, NODE_FILE, name, delay_ms, "1", root / name)
        for name in names:
            mesh.wait_ready(name)
        listen = "\n".join(f'{name} = "127.0.0.1:0"' for name in ("grpc", "http", "metrics"))
        targets = "\n".join(f'[[targets]]\nname = "{name}"\naddress = "{mesh.said[name]["grpc"]}"' for name in names)
        (root / "router.toml").write_text(
            f'data_dir = "{root / "data"}"\nidentity = "{root / "r"}"\nagent = {{ enabled = false }}\n'
            f"[listen]\n{listen}\n{targets}\n"
        )
        mesh.start("r", "-m", "router", "--config", root / "router.toml")
        mesh.wait_ready("r")
        yield mesh
    finally:
        for child in mesh.children.values():
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
