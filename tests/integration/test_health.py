"""The health service that probes of container platforms ask, on processes as they are started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

END_S = 30.0
NOTHING = ("--set=listen.http=127.0.0.1:0", "--set=listen.metrics=", "--set=telemetry.level=error")
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def check(address: str, service: str) -> bytes:
    name = service.encode()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        return call(b"\x0a" + bytes([len(name)]) + name if name else b"", timeout=10)


@pytest.mark.parametrize(("kind", "empty"), [("cloud", SERVING), ("router", NOT_SERVING)])
def test_a_node_tells_a_probe_whether_it_serves(kind: str, empty: bytes, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nearcast", kind, f"--set=data_dir={tmp_path}", "--set=listen.grpc=127.0.0.1:0"]
    with subprocess.Popen([*command, *NOTHING], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = json.loads(process.stdout.readline())["grpc"]
            assert check(address, "") == empty  # a router that knows no target has nothing to offer
            with pytest.raises(grpc.RpcError) as unknown:
                check(address, "no_such_model")
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        finally:
            process.terminate()
        assert process.wait(END_S) == 0
