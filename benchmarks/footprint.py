"""What an edge node takes: on disk with its pinned dependencies, in memory and processor time while it idles."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import time
from pathlib import Path

from benchmarks.processes import serve
from benchmarks.rows import Row
from benchmarks.silero_size import fill_store

LOCK = Path(__file__).parent.parent / "constraints" / "edge.txt"


def run(*, quick: bool) -> list[Row]:
    """Sizes of the installed packages that the edge lock names; memory and CPU of an idle serving process."""
    idle_s = 3.0 if quick else 20.0
    with tempfile.TemporaryDirectory() as folder:
        store, _ = fill_store(Path(folder))
        with serve("benchmarks.serving_server", str(store.root), "serve", cpu=None) as ready:
            time.sleep(1.0)
            began = read_cpu_s(ready["pid"])
            time.sleep(idle_s)
            cpu_share = (read_cpu_s(ready["pid"]) - began) / idle_s
            memory = read_memory_bytes(ready["pid"])
    return [
        Row("footprint.edge_install_mb", measure_install_bytes() / 1e6, "MB", "pinned dependencies of nearcast[edge]"),
        Row("footprint.idle_cpu_percent", cpu_share * 100, "%", "one small model loaded"),
        Row("footprint.idle_rss_mb", memory / 1e6, "MB"),
    ]


def measure_install_bytes() -> int:
    """Bytes of every package that the edge lock names and that is installed here, nearcast's own included."""
    names = set(re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)) | {"nearcast"}
    total = 0
    for name in names:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a lock is for every platform and interpreter
        total += sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())
    return total


def read_cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory_bytes(pid: int | str) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
