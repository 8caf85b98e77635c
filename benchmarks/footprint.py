"""What an edge node takes: on disk with its pinned dependencies, in memory and processor time while it idles.

Sizes on disk are of the files that the packages consist of; interpreters add bytecode of what they import.
The locks are installed anew, which needs the package index; `agent_idle` measures the agent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.rows import Row

LOCKS = Path(__file__).parent.parent / "constraints"
SMALL_MODELS = ("onnx_static", "onnx_dynamic", "litert")


def run(*, quick: bool) -> list[Row]:
    """Sizes of what the edge locks name; memory and CPU of an idle edge node."""
    idle_s = 3.0 if quick else 30.0
    with tempfile.TemporaryDirectory() as folder:
        memory_bytes, asked_bytes, cpu_share = measure_idle(Path(folder), idle_s)
        rows = [
            Row("footprint.idle_cpu_percent", cpu_share * 100, "%", "`nearcast edge` with 3 small models"),
            Row("footprint.idle_rss_mb", memory_bytes / 1e6, "MB", "the same process"),
            Row("footprint.idle_rss_http_mb", asked_bytes / 1e6, "MB", "the same, once it was asked over HTTP"),
        ]
        return rows + measure_installs(Path(folder))


def measure_idle(folder: Path, idle_s: float) -> tuple[int, int, float]:
    """Resident bytes before and after a request over HTTP, and share of one processor, of a node with three models."""
    from benchmarks.reload_models import fill_store
    from benchmarks.swap_latency import start_node
    from nearcast.store import Pointer

    data = folder / "node"
    store = fill_store(folder, data / "models")
    for name in SMALL_MODELS:
        store.write_pointer(name, Pointer(stable=1))
    with start_node(data) as node:
        time.sleep(1.0)
        began, since = read_cpu_s(node.pid), time.monotonic()
        time.sleep(idle_s)
        cpu_share = (read_cpu_s(node.pid) - began) / (time.monotonic() - since)
        idle_bytes = read_memory_bytes(node.pid)
        urllib.request.urlopen(f"http://{node.http}/v2/health/ready").close()
        return idle_bytes, read_memory_bytes(node.pid), cpu_share


def measure_installs(folder: Path) -> list[Row]:
    """Install the locks into folders of their own, as `pip install --no-compile` does."""
    rows = []
    for lock, note in (("edge", "with ONNX Runtime"), ("edge-litert", "with ONNX Runtime and LiteRT")):
        target = folder / lock
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qqq"]
        pins = ["--require-hashes", "-r", str(LOCKS / f"{lock}.txt")]
        subprocess.run([*pip, "install", "--no-compile", "--target", str(target), *pins], check=True, timeout=900)
        name = f"footprint.{lock.replace('-', '_')}_install_mb"
        rows.append(Row(name, measure_folder_bytes(target) / 1e6, "MB", f"{note}, pip install --no-compile"))
        if lock == "edge":
            wheels = folder / "wheels"
            subprocess.run([*pip, "download", "--only-binary=:all:", "-d", str(wheels), *pins], check=True, timeout=900)
            rows.append(Row("footprint.edge_wheels_mb", measure_folder_bytes(wheels) / 1e6, "MB", note))
    return rows


def measure_folder_bytes(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def read_cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory_bytes(pid: int | str) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
