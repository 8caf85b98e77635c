"""No crash breaks a node: power cuts at every system call of a real agent, and real SIGKILLs at every crash point.

The agent's life is recorded once (`crash_scenario`), a model of a forgetful disk makes the images that a power cut may
leave (`crash_disk`), the real agent boots on each of them (`crash_judge`). Agents with one mistake each must be found
out by the same judgement (`crash_mutants`), and `crash_kills` kills real processes.
"""

from __future__ import annotations

import sys

from benchmarks.crash_explore import Found, Plan, explore_in_processes
from benchmarks.crash_kills import Killed, kill_everywhere
from benchmarks.crash_mutants import MUTANTS, first_fault_of
from benchmarks.crash_points import POINTS
from benchmarks.crash_scenario import Recording, live, stage
from benchmarks.crash_trace import is_available
from benchmarks.memory import memory_folder
from benchmarks.rows import Row
from nearcast.telemetry import TelemetryConfig, start

WORKERS = 2
FULL = Plan(images=14_000, per_point=450, networked=100, fetching=60, processes=24)
QUICK = Plan(images=1_600, per_point=100, networked=4, fetching=6, processes=2)
KILLS = 3
"""Deaths at each point before the agent is left alone; one in a quick run."""


def run(*, quick: bool) -> list[Row]:
    """Record, explore, check the judge, kill."""
    if not is_available():
        raise RuntimeError("strace cannot trace processes here; install it, and allow ptrace")
    start("crash", TelemetryConfig(level="error"))
    with memory_folder() as home:
        with stage(home / "life") as life:
            recording = live(life, rounds=1 if quick else 4)
        found = explore_in_processes(recording, QUICK if quick else FULL, WORKERS)
        caught = {name: first_fault_of(name, recording, home / "mutant") for name in MUTANTS}
        with stage(home / "kills") as scene:
            killed = kill_everywhere(scene, kills=1 if quick else KILLS)
    for violation in [*found.examples, *(one for point in killed for one in point.violations)]:
        print(violation, file=sys.stderr)
    for name, fault in caught.items():
        print(f"mutant {name}: {fault or 'NOT FOUND'}"[:160], file=sys.stderr)
    return [*_image_rows(found, recording), *_mutant_rows(caught), *_kill_rows(killed)]


def _image_rows(found: Found, recording: Recording) -> list[Row]:
    counts = {point: len(found.points.get(point, ())) for point in POINTS}
    distinct = len(set().union(*found.points.values()))
    return [
        Row("crash.images", distinct, "images", f"of {len(recording.calls)} calls; {found.judged} judgements"),
        Row(
            "crash.images_min_per_point",
            min(counts.values()),
            "images",
            " ".join(f"{point} {count}" for point, count in counts.items()),
        ),
        Row("crash.violations", found.violations, "", "of I1-I5 and I13"),
        Row("crash.booted_seconds", found.boot_s, "s", f"slowest {1e3 * found.boot_s_max:.0f} ms"),
        Row(
            "crash.network_back",
            found.networked,
            "images",
            f"reached the wanted release; {found.fetching} in a download, at most a chunk of it again",
        ),
        Row("crash.processes", found.processes, "images", "booted by a process of its own"),
    ]


def _mutant_rows(caught: dict[str, str]) -> list[Row]:
    return [Row("crash.mutants_caught", sum(map(bool, caught.values())) / len(MUTANTS), "share", f"of {len(MUTANTS)}")]


def _kill_rows(killed: list[Killed]) -> list[Row]:
    struck = sum(point.kills > 0 for point in killed)
    kills = sum(point.kills for point in killed)
    violations = sum(len(point.violations) for point in killed)
    return [
        Row("crash.points_killed", struck, "points", f"{kills} SIGKILLs at the system calls of C1 to C12"),
        Row("crash.kill_violations", violations, "", "of I1 and I2; every agent came to rest"),
    ]
