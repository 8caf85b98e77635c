"""Measuring a version on this machine, and keeping what was learnt.

A profile holds for one model file, one version of its engine and one kind of processor; with others all is measured
anew. `python -m nearcast.serving.tuning FOLDER PROFILES CONCURRENCY` is the child in which a node measures.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import msgspec

from nearcast.durable import write_file
from nearcast.errors import MeshError
from nearcast.handler import Tensors
from nearcast.serving.engines import LoadedModel, Runner, load_engine
from nearcast.serving.golden import read_tensors, zeros
from nearcast.serving.joining import join
from nearcast.serving.profile import Point, Profile, Setting, choose_threads
from nearcast.serving.signature import Signature
from nearcast.store.contents import Contents
from nearcast.store.manifest import MANIFEST_FILE, Manifest, decode_manifest

_LOG = logging.getLogger(__name__)
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "litert": ("ai-edge-litert",)}
POINT_TIME_S = 0.25
"""How long one setting is measured."""
RUNS_MIN, RUNS_MAX = 5, 2000
ROWS_MAX = 32
PROFILES_MAX = 256
PROFILE_SIZE_BYTES_MAX = 256 * 1024
NICE = 19

Progress = Callable[[Point], None]


class Profiles:
    """A folder of profiles. The host reads them, tuning writes them; what cannot be read counts as not measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, store: Path) -> Profiles:
        """The profiles of the node whose store that is: beside the store, which the agent alone writes."""
        return cls(store.resolve().parent / "profiles")

    def find(self, manifest: Manifest) -> Profile | None:
        """The profile of a version on this machine."""
        if not self.folder.exists():
            return None  # nothing was measured here; a profile's name takes a while to find
        path = self._path(manifest)
        try:
            with path.open("rb") as file:
                profile = msgspec.json.decode(file.read(PROFILE_SIZE_BYTES_MAX), type=Profile)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            _LOG.warning("the profile %s cannot be used: %s", path.name, error)
            return None
        return profile if profile.model_sha256 == manifest.file(manifest.model_file).sha256 else None

    def setting(self, manifest: Manifest) -> Setting | None:
        """What the profile of a version advises; None if there is none."""
        profile = self.find(manifest)
        return None if profile is None else profile.choose()

    def keep(self, manifest: Manifest, profile: Profile) -> None:
        """Store a profile; beyond `PROFILES_MAX` the oldest goes."""
        write_file(self._path(manifest), msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        known = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in known[: max(0, len(known) - PROFILES_MAX)]:
            path.unlink(missing_ok=True)

    def _path(self, manifest: Manifest) -> Path:
        place = f"{engine_version(manifest.engine)} {processor()}"
        model = manifest.file(manifest.model_file).sha256
        return self.folder / f"{model[:24]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"


def measure(
    contents: Contents, *, concurrency: int, time_s_max: float = 30.0, progress: Progress | None = None
) -> Profile:
    """Measure one version: threads first, then batches with the threads that won. Blocks; loads it several times.

    Args:
        contents: the version. Its golden vectors are the inputs, zeros if it has none.
        concurrency: runs at the same time, as the node allows them; 1 for engines that take one at a time.
        time_s_max: no further setting is begun after this; the first is measured in any case.
        progress: told of every point.

    Raises:
        MeshError: as `load_engine`, or what the model raised on its own golden vectors.
    """
    manifest = contents.manifest
    until = time.monotonic() + time_s_max
    vectors = [read_tensors(contents, vector.inputs) for vector in manifest.golden] or [zeros(manifest)]
    points: list[Point] = []
    for threads in _thread_counts():
        points += _measure_rows(contents, vectors, threads, (1,), concurrency, until, progress, first=not points)
    if Signature(manifest).batchable:
        rows = tuple(2**power for power in range(1, ROWS_MAX.bit_length()))
        points += _measure_rows(contents, vectors, choose_threads(points), rows, concurrency, until, progress)
    return Profile(
        model_sha256=manifest.file(manifest.model_file).sha256,
        engine=manifest.engine,
        engine_version=engine_version(manifest.engine),
        processor=processor(),
        concurrency=concurrency,
        latency_budget_ms=manifest.latency_budget_ms,
        points=tuple(points),
    )


def _measure_rows(
    contents: Contents,
    vectors: Sequence[Tensors],
    threads: int,
    counts: Sequence[int],
    concurrency: int,
    until: float,
    progress: Progress | None,
    *,
    first: bool = False,
) -> list[Point]:
    """The points of one loaded engine, as many as there is time for."""
    if not first and time.monotonic() >= until:
        return []
    engine = load_engine(contents, threads=threads)
    points: list[Point] = []
    try:
        axes = Signature(contents.manifest).input_axes
        runners = _runners(engine, contents.manifest, concurrency)
        for rows in counts:
            if points and time.monotonic() >= until:
                break
            inputs = _fill(vectors, rows, axes)
            point = _time(runners, inputs, threads, rows)
            points.append(point)
            if progress is not None:
                progress(point)
    finally:
        engine.close()
    return points


def _runners(engine: LoadedModel, manifest: Manifest, concurrency: int) -> list[Runner]:
    if manifest.stateful == "hidden":
        return [engine.new_sequence() for _ in range(concurrency)]
    return [engine] * (concurrency if engine.concurrent else 1)


def _fill(vectors: Sequence[Tensors], rows: int, axes: dict[str, int]) -> Tensors:
    """Inputs of `rows` rows, from vectors of one row if there are any."""
    if rows == 1:
        return vectors[0]
    first = vectors[0]
    fitting = [v for v in vectors if all(v[name].shape == first[name].shape for name in axes)]
    return join([fitting[index % len(fitting)] for index in range(rows)], axes)


def _time(runners: Sequence[Runner], inputs: Tensors, threads: int, rows: int) -> Point:
    """Run on all runners at once for `POINT_TIME_S`; the runs until each has had its first are not counted."""
    for runner in runners:
        runner.run(inputs)
    began = time.perf_counter()
    with ThreadPoolExecutor(len(runners), "nearcast-tune") as pool:
        times = sorted(took for run in pool.map(lambda runner: list(_runs(runner, inputs)), runners) for took in run)
    elapsed_s = time.perf_counter() - began
    return Point(
        threads=threads,
        rows=rows,
        p50_us=round(times[len(times) // 2] * 1e6, 1),
        p95_us=round(times[int(0.95 * (len(times) - 1))] * 1e6, 1),
        rows_per_s=round(rows * len(times) / elapsed_s, 1),
    )


def _runs(runner: Runner, inputs: Tensors) -> Iterator[float]:
    until = time.perf_counter() + POINT_TIME_S
    for count in range(RUNS_MAX):
        began = time.perf_counter()
        if began >= until and count >= RUNS_MIN:
            return
        runner.run(inputs)
        yield time.perf_counter() - began


def _thread_counts() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({min(cores, 2**power) for power in range(cores.bit_length() + 1)})


@cache
def processor() -> str:
    """The processor's name and how many of it this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    return f"{next(named, platform.machine())} x {len(os.sched_getaffinity(0))}"


@cache
def engine_version(engine: str) -> str:
    """The installed version of an engine's library; "" if none is installed."""
    from importlib import metadata

    for package in _PACKAGES.get(engine, (engine,)):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


def main(arguments: Sequence[str]) -> int:
    """The child of a node: measure the version in a folder and keep its profile."""
    folder, profiles, concurrency = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    tenant_keys = Path(arguments[3]) if len(arguments) > 3 else None
    os.nice(NICE)
    try:
        manifest = decode_manifest((folder / MANIFEST_FILE).read_bytes())
        contents = Contents(manifest, folder, tenant_keys=tenant_keys)
        Profiles(profiles).keep(manifest, measure(contents, concurrency=concurrency))
    except (MeshError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def tune_command(folder: Path, profiles: Path, *, concurrency: int, tenant_keys: Path | None = None) -> list[str]:
    """The child that measures the version in `folder`."""
    command = [sys.executable, "-m", "nearcast.serving.tuning", str(folder), str(profiles), str(concurrency)]
    return [*command, str(tenant_keys)] if tenant_keys else command


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
