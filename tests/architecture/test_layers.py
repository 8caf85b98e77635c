"""The arrows of the house, and what a plain import may cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("ai_edge_litert", "aiohttp", "asyncio", "cryptography", "google.protobuf", "grpc", "msgspec", "ngh2", "numpy"),
    *("onnxruntime", "mqtt5", "cbor2", "prometheus_client", "rich", "structlog", "tuf", "uvloop"),
)


def test_every_layer_imports_only_those_below() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import nearcast",
        "import nearcast.cli",
        "from nearcast.cli import main; main(['--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_device_loads_no_other_transport() -> None:
    others = ("aiohttp", "cryptography", "grpc", "ngh2", "onnxruntime", "prometheus_client", "router")
    program = f"import nearcast.client.mqtt\nimport sys\nprint('loaded:', *(n for n in {others!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_the_client_package_has_what_it_names() -> None:
    import nearcast.client

    assert {*nearcast.client.__all__} <= {*dir(nearcast.client)}
    assert {getattr(nearcast.client, name).__name__ for name in nearcast.client.__all__} == {*nearcast.client.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = nearcast.client.Nothing
