"""The main job, as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ONCE_TIMEOUT_S = 300
DRAIN_S = 5.0 + 2.0  # drain, and the interpreter's own end


@pytest.mark.timeout(ONCE_TIMEOUT_S + 10)
def test_the_demo_checks_itself_and_ends_with_0(tmp_path):
    command = [sys.executable, "-m", "nearcast", "demo", "--once", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ONCE_TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    held = re.search(r"(\d+) of (\d+) checks held", done.stdout)
    assert held is not None
    assert held[1] == held[2]
    assert int(held[1]) >= 20
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(240)
def test_ctrl_c_ends_a_mesh_in_time_and_leaves_nothing_behind(tmp_path):
    command = [
        sys.executable,
        "-m",
        "nearcast",
        "up",
        "--json",
        "--set",
        f"data_dir={tmp_path}",
        "--set",
        "first_ports=false",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        assert "addresses" in child.stdout.readline() + child.stdout.readline() + child.stdout.readline()
        began = time.monotonic()
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(timeout=120) == 0
        assert time.monotonic() - began < DRAIN_S
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()
    assert processes_that_name(tmp_path) == []


def processes_that_name(folder: Path) -> list[str]:
    """Command lines that still run and name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if str(folder) in line:
            found.append(line)
    return found
