"""Boots the real agent on a disk image, without a network, and says which promises it broke."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.crash_disk import Image, sha256_of
from benchmarks.crash_points import JOURNAL, STORE, Known, versions_of
from benchmarks.crash_scenario import AgentProcess, Recording
from model_sync.agent.app import Agent
from model_sync.agent.config import AgentConfig, AgentLimits
from model_sync.agent.install.steps import installed_releases
from model_sync.agent.journal import decode_record, read_journal
from model_sync.agent.status import read_status
from model_sync.delta.index import INDEX_FILE, decode_index
from model_sync.replica.state import Memory
from model_sync.repository.layout import blob_path, delta_path
from nearcast.store import Pointer, Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES, MANIFEST_FILE, File, Manifest
from tests.integration.agent_parts import MODEL, Origin

BOOT_S_MAX = 5.0
"""I2: how long a node may take from its start to its answer."""
REACH_S_MAX = 20.0
NOWHERE = "http://127.0.0.1:9/repository"
"""A repository that refuses connections: the node has no network."""


def judge_image(image: Image, known: Known, recording: Recording) -> list[str]:
    """What is wrong before any process has run: a host may be faster than its agent."""
    found = [f"I4 {fault}" for fault in _older(versions_of(image), known)]
    pointer = _pointer_in(image)
    allowed = known.pointers[max(0, known.pointers_durable - 1) :]
    if known.pointers_durable and pointer not in allowed:
        found.append(f"I2 the pointer is {pointer}, but {allowed[0]} was durable")
    found += [
        f"I1 the pointer names release {release}, which is not the signed one"
        for release in _named(pointer)
        if not _is_whole(image, release, recording.manifests)
    ]
    memory = _memory_in(image)
    kept = known.records[max(0, known.records_durable - 1) :]
    if known.records_durable and memory not in kept:
        found.append(f"I3 the journal ends with {memory}, but {kept[0]} was durable")
    return found


async def judge_boot(image: Image, known: Known, recording: Recording, folder: Path) -> list[str]:
    """What is wrong after the agent has started and found no network."""
    write_image(image, folder)
    started = time.monotonic()
    config = make_config(recording, folder, repository=NOWHERE)
    agent = Agent(config)
    try:
        await agent.start()
        took_s = time.monotonic() - started
        await agent.check()
    except Exception as error:  # noqa: BLE001 (whatever it is, the node does not come up)
        return [f"I2 the agent does not start: {error!r}"]
    finally:
        await agent.close()
    found = [f"I2 the start took {took_s:.1f} s"] if took_s > BOOT_S_MAX else []
    memory = _memory(Path(config.store))
    committed = set(_committable(known.records[max(0, known.records_durable - 1) :]))
    if known.records_durable and memory.committed not in committed:
        found.append(f"I3 release {memory.committed} counts as committed, but {committed} was")
    return found + _judge_store(Path(config.store), known, recording)


def _judge_store(root: Path, known: Known, recording: Recording) -> list[str]:
    store, memory = Store(root), _memory(root)
    pointer, whole = store.pointer(MODEL), installed_releases(store, MODEL)
    found = [
        f"I1 release {release} is served, and it is not the signed one"
        for release in _named(pointer)
        if whole.get(release) != recording.manifests[release]
    ]
    stable = pointer.stable if pointer is not None else None
    if known.is_committed and stable is None:
        found.append(f"I2 nothing is served after {known.pointers[known.pointers_durable - 1]}")
    if stable is not None:
        found += _judge_trust(stable, memory)
    files = {
        f"{STORE}/{path.relative_to(root)}": path.read_bytes()
        for path in (root / ".agent" / "metadata").rglob("*.json")
        if not path.is_symlink()
    }
    return found + [f"I4 {fault}" for fault in _older(versions_of(dict(files)), known)]


def _memory(root: Path) -> Memory:
    return read_journal(root / ".agent" / "journal").get(MODEL, Memory(model=MODEL))


def _committable(records: list[Memory]) -> Iterator[int | None]:
    """What may count as committed without a network: what did, and where a signed rollback was already returning to."""
    for record in records:
        yield record.committed
        on_trial = record.goal is not None and record.previous is not None and record.slot == "stable"
        if record.goal is not None and on_trial and record.goal.release < (record.committed or 0):
            yield record.goal.release


def _judge_trust(stable: int, memory: Memory) -> Iterator[str]:
    """What answers was committed, or is on trial with a way back, and has passed its gate."""
    goal = memory.goal
    on_trial = goal is not None and goal.release == stable and memory.previous is not None
    if stable != memory.committed and not on_trial:
        yield f"I3 release {stable} is served; {memory.committed} is committed and nothing is on trial"
    if str(stable) not in memory.gated:
        yield f"I5 release {stable} is served, and the journal knows of no gate that it passed"


def make_config(recording: Recording, folder: Path, **fields: Any) -> AgentConfig:
    """An agent on the image in `folder`."""
    identity = folder.parent / f"{folder.name}-identity"
    identity.mkdir(exist_ok=True)
    (identity / "root.json").write_bytes(recording.root)
    defaults: dict[str, Any] = {"identity": str(identity), "store": str(folder / STORE), "poll_s": 600.0}
    limits = AgentLimits(backoff_base_s=0.05, backoff_cap_s=0.1, free_bytes_min=0)
    return AgentConfig(**{"probation_s": 600.0, **defaults, **fields}, limits=limits)


def write_image(image: Image, folder: Path) -> None:
    """Put an image on a real file system."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in image.items():
        place = folder / path
        if content is None:
            place.mkdir()
        elif isinstance(content, str):
            place.symlink_to(content)
        else:
            place.write_bytes(content)


def _pointer_in(image: Image) -> Pointer | None:
    try:
        return msgspec.json.decode(_file(image, f"{STORE}/{MODEL}/serving.json"), type=Pointer)
    except (KeyError, msgspec.DecodeError):
        return None


def _memory_in(image: Image) -> Memory | None:
    memories = [decode_record(line) for line in _file(image, JOURNAL).split(b"\n")] if JOURNAL in image else []
    return next((memory for memory in reversed(memories) if memory is not None and memory.model == MODEL), None)


def _is_whole(image: Image, release: int, manifests: dict[int, str]) -> bool:
    folder = f"{STORE}/{MODEL}/{release}"
    try:
        data = _file(image, f"{folder}/{MANIFEST_FILE}")
        if sha256_of(data) != manifests[release]:
            return False
        files = msgspec.json.decode(data, type=Manifest).files
        return all(sha256_of(_file(image, f"{folder}/{entry.path}")) == entry.sha256 for entry in files)
    except KeyError:
        return False


def _file(image: Image, path: str) -> bytes:
    content = image[path]
    if not isinstance(content, bytes):
        raise KeyError(path)
    return content


def _named(pointer: Pointer | None) -> list[int]:
    if pointer is None:
        return []
    return [release for release in (pointer.stable, pointer.candidate, pointer.last_good) if release is not None]


def _older(versions: dict[str, int], known: Known) -> list[str]:
    return [
        f"{role} is at {versions.get(role, 0)}, but {version} was trusted"
        for role, version in known.versions.items()
        if versions.get(role, 0) < version
    ]


def judge_process(image: Image, known: Known, recording: Recording, home: Path) -> list[str]:
    """The same for a real agent process, which is asked for nothing but its status."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "identity").mkdir(parents=True)
    (home / "identity" / "root.json").write_bytes(recording.root)
    write_image(image, home / "disk")
    agent = AgentProcess(home, NOWHERE, probation_s=600.0)
    try:
        if known.is_committed:
            agent.until("it speaks of the model", lambda _: True)
    except RuntimeError as error:
        return [f"I2 {error}"]
    finally:
        agent.end(signal.SIGKILL)
    return _judge_store(agent.store, known, recording)


async def judge_network(image: Image, known: Known, recording: Recording, folder: Path, origin: Origin) -> list[str]:
    """What is wrong once the network is back: the wanted release is not reached, or too much is fetched again."""
    write_image(image, folder)
    origin.served.clear()
    config = make_config(recording, folder, repository=f"{origin.url}/repository", probation_s=0.05, poll_s=0.2)
    agent = Agent(config)
    try:
        await agent.start()
        if not await _reaches(Path(config.store), recording.final):
            return [f"I2 release {recording.final} is not reached: {read_status(Path(config.store))}"]
    finally:
        await agent.close()
    found = _judge_store(Path(config.store), known, recording)
    data = (Path(config.store) / MODEL / str(recording.final) / MANIFEST_FILE).read_bytes()
    for entry in msgspec.json.decode(data, type=Manifest).files:
        found += _judge_bytes(entry, known, recording, origin)
    return found


def _judge_bytes(entry: File, known: Known, recording: Recording, origin: Origin) -> Iterator[str]:
    """What came before the cut and what came after it are the file, or the payload to it, and a chunk at most."""
    staged = f"{STORE}/.staging/{MODEL}/{recording.final}"
    index = recording.repository / delta_path(entry.sha256, INDEX_FILE)
    ways = decode_index(index.read_bytes()).ways if index.exists() else ()
    wholes = [(f"{staged}/{entry.path}", blob_path(entry.sha256), entry.size_bytes)] if not ways else []
    wholes += [(f"{staged}/.{way.sha256}.delta", delta_path(entry.sha256, way.name), way.size_bytes) for way in ways]
    for place, source, size_bytes in wholes:
        fetched = sum(size for path, _, size in origin.served if source in path)
        again = known.staged_bytes.get(place, 0) + fetched - size_bytes
        if again > CHUNK_SIZE_BYTES:
            yield f"I13 {again} bytes of {source} were fetched again"


async def _reaches(store: Path, release: int) -> bool:
    deadline = time.monotonic() + REACH_S_MAX
    while time.monotonic() < deadline:
        status = read_status(store)
        model = status.models.get(MODEL) if status is not None and status.pid == os.getpid() else None
        if model is not None and (model.state, model.stable, model.candidate) == ("IDLE", release, None):
            return True
        await asyncio.sleep(0.01)
    return False
