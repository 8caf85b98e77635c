"""Real SIGKILLs: a real agent process dies at the very system call that ends a state, is started again, and again.

`strace` delivers the signal on entering the call, so the agent needs no code for it. After each death the disk is
judged as a host would find it; the last start is left alone and must reach a rest that the channel allows.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crash_points import POINTS, STORE
from benchmarks.crash_scenario import AgentProcess, ScriptedHost, Stage
from model_sync.agent.install.steps import installed_releases
from model_sync.agent.status import ModelStatus
from nearcast.store import Store
from tests.integration.agent_parts import MODEL

WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A system call of one thread: the `nth` of its kind whose (first) path is this one, below the store."""

    call: str
    path: str
    nth: int = 1


def spots(release: int, oldest: int) -> dict[str, Spot]:
    """Where to kill while `release` is installed and `oldest` is collected; the journal gets GATE, ACTIVATE, …"""
    staged, journal = f".staging/{MODEL}/{release}", ".agent/journal"
    return {
        "C1": Spot(call="mkdir", path=staged),
        "C2": Spot(call="openat", path=f"{staged}/model.onnx"),
        "C3": Spot(call="fdatasync", path=f"{staged}/golden.bin"),
        "C4": Spot(call="openat", path=f"{staged}/golden.bin", nth=2),
        "C5": Spot(call="openat", path=f"{staged}/manifest.json"),
        "C6": Spot(call="fsync", path=MODEL),
        "C7": Spot(call="write", path=journal, nth=2),
        "C8": Spot(call="write", path=journal, nth=3),
        "C9": Spot(call="write", path=journal, nth=4),
        "C10": Spot(call="fsync", path=journal, nth=4),
        "C11": Spot(call="rename", path=f"{MODEL}/{oldest}"),
        "C12": Spot(call="fsync", path=journal, nth=4),
    }


@dataclass(slots=True)
class Killed:
    """What happened at one point."""

    point: str
    kills: int
    violations: list[str]


def kill_everywhere(
    stage: Stage, *, kills: int, points: Iterable[str] = POINTS, updates: int = 2, workers: int = 2
) -> list[Killed]:
    """Prepare a disk by updates, two if C11 is to collect one, then kill an agent on a copy of it at each point."""
    stage.push(padding=0)
    stage.publisher.roll(stage.release)
    stage.start(traced=False)
    stage.agent.rests(stage.release)
    for _ in range(updates):
        stage.update()
    stage.agent.end(signal.SIGTERM)
    good, bad = stage.host, ScriptedHost(stage.home / "bad-host")
    release = stage.push()
    bad.bad.add(release)
    stage.publisher.roll(release)
    try:
        with ThreadPoolExecutor(workers) as pool:
            jobs = [
                pool.submit(_kill_at, stage, point, bad if point == "C12" else good, release, kills) for point in points
            ]
            return [job.result() for job in jobs]
    finally:
        bad.close()


def _kill_at(stage: Stage, point: str, host: ScriptedHost, release: int, kills: int) -> Killed:
    home = stage.home / f"kill-{point}"
    shutil.copytree(stage.home / "disk", home / "disk", symlinks=True)
    shutil.copytree(stage.home / "identity", home / "identity")
    manifests = {number: pick.manifest_sha256 for number, pick in stage.publisher.picks.items()}
    spot = spots(release, oldest=release - 2)[point]
    done = Killed(point, 0, [])
    for number in range(kills):
        agent = AgentProcess(home, stage.repository, number, prefix=inject(spot, home), host_socket=str(host.path))
        died = _dies(agent, release)
        done.kills += died
        if not died and not number:
            done.violations.append(f"{point}: the agent never came to {spot}")
        done.violations += _unsound(home, point, manifests, {release - 1, release})
    last = AgentProcess(home, stage.repository, kills, host_socket=str(host.path))
    try:
        last.until("it rests", lambda model: _is_at_rest(model, release))
    except RuntimeError as error:
        done.violations.append(f"{point}: {error}")
    last.end(signal.SIGTERM)
    wanted = {release - 1} if point == "C12" else {release, release - 1}
    done.violations += _unsound(home, point, manifests, wanted)
    return done


def inject(spot: Spot, home: Path) -> list[str]:
    """The tracer's command line that kills at the spot."""
    place = str(home / "disk" / STORE / spot.path)
    what = f"{spot.call}:signal=KILL:when={spot.nth}"
    return ["strace", "-f", "-o", os.devnull, "-P", place, "-e", f"trace={spot.call}", "-e", f"inject={what}"]


def _dies(agent: AgentProcess, release: int) -> bool:
    """Whether the agent was killed before it came to rest; it is gone afterwards in any case."""
    deadline = time.monotonic() + WAIT_S
    while agent.process.poll() is None and time.monotonic() < deadline:
        status = agent.model()
        if status is not None and _is_at_rest(status, release):
            break
        time.sleep(0.01)
    died = agent.process.poll() is not None
    if died:
        agent.close()
    else:
        agent.end(signal.SIGKILL)
    return died


def _is_at_rest(model: ModelStatus, release: int) -> bool:
    return model.state == "IDLE" and (model.stable == release or release in model.quarantined)


def _unsound(home: Path, point: str, manifests: dict[int, str], allowed: set[int]) -> list[str]:
    """I1 and I2 as the host finds them, with no agent alive."""
    store = Store(home / "disk" / STORE)
    pointer, whole = store.pointer(MODEL), installed_releases(store, MODEL)
    if pointer is None or pointer.stable not in allowed:
        return [f"{point}: I2 the pointer is {pointer}"]
    named = (pointer.stable, pointer.candidate, pointer.last_good)
    return [
        f"{point}: I1 release {one} is not the signed one"
        for one in named
        if one is not None and whole.get(one) != manifests[one]
    ]
