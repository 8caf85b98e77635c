"""Walks a trace, takes the images that a power cut may leave at each position, and has each of them judged."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec

from benchmarks.crash_disk import Disk, Image, digest_of
from benchmarks.crash_judge import judge_boot, judge_image, judge_network, judge_process
from benchmarks.crash_points import STORE, Known, positions
from benchmarks.crash_scenario import Recording
from benchmarks.crash_trace import Call
from benchmarks.memory import memory_folder
from nearcast.telemetry import TelemetryConfig, start
from tests.integration.agent_parts import MODEL, Origin, Publisher

TRIES = 6
"""Images drawn for each one that is wanted; the others were seen before."""
SURPLUS = 1.25
"""Taken for each image that is wanted: some are found at two points, and some positions have only old ones."""
FETCHING = ("C3", "C4", "C5", "C6")
FETCHING_SHARE = 0.3
"""Of the images with a download under way, spread over it."""
VIOLATIONS_KEPT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to explore.

    Attributes:
        images: wanted in all; each position gets its share.
        per_point: wanted at each crash point.
        networked, processes: images that are booted once more with the network back, and by a real process; about.
        fetching: images with a download under way that are booted once more with the network back; at most.
        share, shares: this worker takes every `shares`-th position.
    """

    images: int
    per_point: int
    networked: int = 0
    processes: int = 0
    fetching: int = 0
    share: int = 0
    shares: int = 1


@dataclass(slots=True)
class Found:
    """What came out: digests by point, images judged, violations (the first few in words), seconds spent in boots."""

    points: dict[str, set[str]] = field(default_factory=dict)
    judged: int = 0
    violations: int = 0
    examples: list[str] = field(default_factory=list)
    boot_s: float = 0.0
    boot_s_max: float = 0.0
    networked: int = 0
    processes: int = 0
    fetching: int = 0

    def note(self, known: Known, faults: list[str]) -> None:
        """Count what an image did wrong."""
        self.violations += len(faults)
        self.examples += [f"{known.point} at call {known.index}: {fault}" for fault in faults]
        del self.examples[VIOLATIONS_KEPT:]

    def add(self, part: Found) -> None:
        """Take in what another worker found."""
        for point, digests in part.points.items():
            self.points.setdefault(point, set()).update(digests)
        self.judged += part.judged
        self.violations += part.violations
        self.examples += part.examples
        self.boot_s += part.boot_s
        self.boot_s_max = max(self.boot_s_max, part.boot_s_max)
        self.networked += part.networked
        self.processes += part.processes
        self.fetching += part.fetching


def explore(recording: Recording, plan: Plan, folder: Path) -> Found:
    """Judge the images of this worker's positions."""
    found, seen, disk = Found(), set[object](), Disk()
    quotas, draw = _quotas(recording.calls, plan), random.Random(plan.share)
    with asyncio.Runner() as runner, _origin(recording) as origin:
        for known, call in zip(positions(recording.calls, MODEL), recording.calls, strict=True):
            disk.apply(call)
            if known.index % plan.shares != plan.share:
                continue
            wanted = int(quotas[known.point] + draw.random())
            for image in _new_images(disk, known, wanted, seen):
                found.points.setdefault(known.point, set()).add(digest_of(image))
                found.judged += 1
                found.note(known, judge_image(image, known, recording))
                started = time.monotonic()
                found.note(known, runner.run(judge_boot(image, known, recording, folder)))
                found.boot_s += time.monotonic() - started
                found.boot_s_max = max(found.boot_s_max, time.monotonic() - started)
                sample = _sample(plan, found, known, recording, draw)
                if sample == "process":
                    found.processes += 1
                    found.note(known, judge_process(image, known, recording, folder.with_suffix(".process")))
                elif sample:
                    found.networked += 1
                    found.fetching += sample == "fetching"
                    found.note(known, runner.run(judge_network(image, known, recording, folder, origin)))
    return found


def _sample(plan: Plan, found: Found, known: Known, recording: Recording, draw: random.Random) -> str:
    """Whether this image is booted once more, and how; images with a download under way have a number of their own."""
    staged = f"{STORE}/.staging/{MODEL}/{recording.final}/"
    fetching = known.point in FETCHING and any(path.startswith(staged) for path in known.staged_bytes)
    if fetching and found.fetching < plan.fetching and draw.random() < FETCHING_SHARE:
        return "fetching"
    chance = draw.random() * plan.images / plan.shares
    if chance < plan.networked:
        return "network"
    return "process" if chance < plan.networked + plan.processes else ""


def first_fault(
    recording: Recording,
    calls: Sequence[Call],
    near: Collection[int],
    promised: Sequence[Call],
    folder: Path,
    *,
    per: int,
) -> str:
    """The first violation of a changed trace, looking only near the positions given; "" = none."""
    disk, seen = Disk(), set[object]()
    wanted = frozenset(near)
    with asyncio.Runner() as runner:
        for known, call in zip(positions(promised, MODEL), calls, strict=True):
            disk.apply(call)
            if known.index not in wanted:
                continue
            for image in _new_images(disk, known, per, seen):
                faults = judge_image(image, known, recording)
                faults = faults or runner.run(judge_boot(image, known, recording, folder))
                if faults:
                    return faults[0]
    return ""


def _quotas(calls: Sequence[Call], plan: Plan) -> dict[str, float]:
    """Images to take at one position of each point; more than are wanted, as some are taken at two points."""
    counts = Counter(known.point for known in positions(calls, MODEL))
    return {
        point: max(SURPLUS * plan.images / len(calls), 2 * SURPLUS * plan.per_point / count)
        for point, count in counts.items()
    }


def _new_images(disk: Disk, known: Known, wanted: int, seen: set[object]) -> Iterator[Image]:
    """Images that were not judged by this promise before."""
    taken = 0
    for tried, image in enumerate(disk.images(known.index)):
        if taken >= wanted or tried >= TRIES * wanted:
            return
        key = digest_of(image), known.promise
        if key not in seen:
            seen.add(key)
            taken += 1
            yield image


@contextmanager
def _origin(recording: Recording) -> Iterator[Origin]:
    """The repository as it was at the end, served by this process."""
    repository = SimpleNamespace(folder=recording.repository, serial=recording.serial)
    origin = Origin(cast("Publisher", SimpleNamespace(repository=repository)))
    try:
        yield origin
    finally:
        origin.close()


def explore_in_processes(recording: Recording, plan: Plan, workers: int) -> Found:
    """The same, shared by processes."""
    with memory_folder() as home:
        recording.save(home / "recording")
        started = [_start_worker(home, plan, index, workers) for index in range(workers)]
        try:
            parts = [_result(process) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    total = Found()
    for part in parts:
        total.add(part)
    return total


def _start_worker(home: Path, plan: Plan, index: int, workers: int) -> subprocess.Popen[bytes]:
    share = {
        "networked": plan.networked // workers,
        "processes": plan.processes // workers,
        "fetching": plan.fetching // workers,
    }
    own = msgspec.json.encode(replace(plan, **share, share=index, shares=workers)).decode()
    command = [sys.executable, "-m", "benchmarks.crash_explore", str(home), own]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _result(process: subprocess.Popen[bytes]) -> Found:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"an exploring process ended with {process.returncode}")
    return msgspec.json.decode(output, type=Found)


def main() -> None:
    """One worker: prints what it found as JSON."""
    home, plan = Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Plan)
    start("crash", TelemetryConfig(level="error"))
    found = explore(Recording.load(home / "recording"), plan, home / f"image-{plan.share}")
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
