"""nearcast under test, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.peers import stop_group


@contextlib.contextmanager
def nearcast_server() -> Iterator[dict[str, str]]:
    """The contract served by nearcast; yields where: `ngh2`, `grpcio`, `rest`."""
    command = [sys.executable, "-m", "tests.compat.servers.nearcast_server"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"nearcast ended with {child.wait()} before it was ready")
        yield json.loads(line)
    finally:
        stop_group(child)
        child.stdout.close()
