"""The process that applies a delta: whatever ends it, the agent goes on, without what only that process needs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from model_sync.agent.install import patch_child
from model_sync.agent.install.bases import Bases
from model_sync.agent.install.patch_child import PatchChild
from model_sync.agent.install.shorter_ways import DeltaError, ShorterWay
from model_sync.delta import chunks
from model_sync.delta.search import ENCODERS, describe_way
from nearcast.errors import Code, MeshError
from nearcast.store import Store
from nearcast.store.manifest import File
from tests.integration.agent_parts import MODEL, Publisher, make_config, running, serving, settled, status_of
from tests.integration.delta_parts import publish_delta, push_weights, weights, write_index
from tests.integration.test_agent_process import AgentProcess
from tests.patience import own_time, until
from tests.tiny_models import write_version

RSS_BYTES_MAX = 60e6
ONLY_THE_PATCH = "import os, sys, time\nif 'model_sync.agent.install.patch' in sys.orig_argv:\n    "


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the process runs before anything else."""
    folder = tmp_path / "hook"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "sitecustomize.py"


def sleep_in(hook: Path) -> Path:
    """Let the process write its number and sleep; returns where."""
    note = hook.with_name("pid")
    hook.write_text(f"{ONLY_THE_PATCH}open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    return note


def await_note(note: Path) -> int:
    deadline = time.monotonic() + 10.0
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(note.read_text())


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class Workbench:
    """A store with release 1, and a staged payload that leads to a file of release 2."""

    def __init__(self, folder: Path) -> None:
        self.new = weights(changed=0.02)
        self.store = Store(folder / "store")
        staged = self.store.stage_folder(MODEL, 1)
        old = write_version(staged, weights(), name=MODEL, release=1)
        self.store.commit(MODEL, 1, staged)
        self.manifest = write_version(folder / "new", self.new, name=MODEL, release=2)
        self.staged = self.store.stage_folder(MODEL, 2)
        self.stop = threading.Event()
        self.bases = Bases(self.store, MODEL)
        self.child = PatchChild(self.store.root, self.manifest, self.staged, tenant_keys=None, stop=self.stop)
        base = old.file(old.model_file)
        self.shorter = self.way("residual-bz2", base.sha256, ENCODERS["residual-bz2"](weights(), self.new))

    def way(self, codec: str, base: str | None, payload: bytes) -> ShorterWay:
        shorter = ShorterWay(entry=self.entry, way=describe_way(codec, base, payload))  # type: ignore[arg-type]
        (self.staged / shorter.payload_name).write_bytes(payload)
        return shorter

    @property
    def entry(self) -> File:
        return self.manifest.file(self.manifest.model_file)

    def make(self, *, within_s: float = 20.0) -> bytes:
        assert self.shorter.way is not None
        bases = self.bases.of(self.shorter.way)
        return b"".join(self.child.make(self.shorter, bases, deadline=time.monotonic() + within_s))


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def test_it_makes_the_file_and_ends(bench: Workbench) -> None:
    assert bench.make() == bench.new


def test_killed_from_outside_it_is_a_failed_delta(bench: Workbench, hook: Path) -> None:
    note = sleep_in(hook)
    killer = threading.Thread(target=lambda: os.kill(await_note(note), signal.SIGKILL))
    killer.start()
    with pytest.raises(DeltaError, match="was killed") as caught:
        bench.make()
    killer.join()
    assert caught.value.code is Code.UNTRUSTED


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGXCPU])
def test_a_crash_is_a_failed_delta(bench: Workbench, hook: Path, number: int) -> None:
    hook.write_text(f"{ONLY_THE_PATCH}os.kill(os.getpid(), {int(number)})")
    with pytest.raises(DeltaError, match="the process that applied it (crashed|used too much CPU time)"):
        bench.make()


def test_over_its_memory_it_is_a_failed_delta(bench: Workbench, hook: Path) -> None:
    """A decoder that takes as much as it likes: beyond 1 GiB and some it gets nothing."""
    hook.write_text(f"{ONLY_THE_PATCH}import bz2; bz2.BZ2Decompressor = lambda: bytearray(1200 * 1024**2)")
    with pytest.raises(DeltaError, match="MemoryError"):
        bench.make()


def test_in_much_too_little_memory_it_is_a_failed_delta(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    for size_bytes in (0, 64 * 1024**2):
        monkeypatch.setattr(patch_child, "ADDRESS_SPACE_BYTES", size_bytes)
        with pytest.raises(DeltaError):
            bench.make()


def test_too_slow_it_is_a_failed_delta(bench: Workbench, hook: Path) -> None:
    note = sleep_in(hook)
    with pytest.raises(DeltaError, match="too long"):
        bench.make(within_s=0.3)
    assert not note.exists() or not is_alive(await_note(note))


def test_stopped_it_is_no_failure(bench: Workbench, hook: Path) -> None:
    note, began = sleep_in(hook), []

    def stop() -> None:
        await_note(note)
        began.append(own_time())
        bench.stop.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(MeshError) as caught:
        bench.make()
    stopper.join()
    assert caught.value.code is Code.CANCELLED
    assert not isinstance(caught.value, DeltaError)
    assert own_time() - began[0] < 1.0
    assert not is_alive(await_note(note))


@pytest.mark.parametrize("written", ["b'x'", "b'x' * 700_000", "b''"])
def test_whoever_takes_it_over_can_only_fail(bench: Workbench, hook: Path, written: str) -> None:
    hook.write_text(f"{ONLY_THE_PATCH}os.write(1, {written}); os._exit(0)")
    with pytest.raises(DeltaError, match="not the signed file"):
        bench.make()


@pytest.mark.parametrize("answer", ["null", "[[0,10],[5,10]]", "[[0,-1]]", "[[599999999,9]]", "{}", "[" * 70_000])
def test_a_list_of_parts_is_believed_as_far_as_it_fits(bench: Workbench, hook: Path, answer: str) -> None:
    hook.write_text(f"{ONLY_THE_PATCH}os.write(1, {answer.encode()!r}); os._exit(0)")
    shorter = bench.way("chunks", None, chunks.encode(bench.new))
    with pytest.raises(DeltaError):
        bench.child.measure(shorter, (), deadline=time.monotonic() + 20.0)


def test_its_limits_bound_what_it_may_do(bench: Workbench, hook: Path) -> None:
    """What the process sets itself, seen from its own `resource`."""
    note = hook.with_name("limits")
    hook.write_text(
        f"{ONLY_THE_PATCH}import atexit, resource; atexit.register(lambda: open({str(note)!r}, 'w').write("
        "' '.join(str(resource.getrlimit(k)[0]) for k in (0, 1, 4, 9))))"
    )
    assert bench.make(within_s=20.0) == bench.new
    cpu_s, file_bytes, core_bytes, memory_bytes = (int(one) for one in note.read_text().split())
    assert (cpu_s, file_bytes, core_bytes) == (20, 64 * 1024, 0)
    assert 1024**3 < memory_bytes < 1024**3 + 10 * 1024**2


# -- in an agent -------------------------------------------------------------------------------------------------------


async def test_a_newer_intent_ends_a_long_apply_at_once(tmp_path: Path, hook: Path) -> None:
    publisher = Publisher(tmp_path / "home")
    old = push_weights(publisher, 1, weights())
    new = push_weights(publisher, 2, weights(changed=0.02))
    publish_delta(publisher, old, new)
    push_weights(publisher, 3, weights(seed=9))
    publisher.roll(1)
    with serving(publisher) as origin:
        async with running(make_config(tmp_path, publisher, origin)) as agent:
            await settled(agent, stable=1)
            note = sleep_in(hook)
            publisher.roll(2)
            await agent.check()
            await until(lambda: note.exists() and note.read_text(), "it is patching")
            assert status_of(agent).state == "PATCH"
            publisher.roll(3)
            began = own_time()
            await agent.check()
            await until(lambda: status_of(agent).goal == 3 and not is_alive(int(note.read_text())), "it is ended")
            assert own_time() - began < 1.0
            await settled(agent, stable=3)
            assert status_of(agent).quarantined == ()


async def test_a_node_without_the_memory_takes_the_full_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(tmp_path / "home")
    old = push_weights(publisher, 1, weights())
    new = push_weights(publisher, 2, weights(changed=0.02))
    publish_delta(publisher, old, new)
    publisher.roll(1)
    with serving(publisher) as origin:
        async with running(make_config(tmp_path, publisher, origin)) as agent:
            await settled(agent, stable=1)
            monkeypatch.setattr(patch_child, "ADDRESS_SPACE_BYTES", 1)
            monkeypatch.setattr(patch_child, "ADDRESS_SPACE_FACTOR", 1)
            publisher.roll(2)
            await agent.check()
            await settled(agent, stable=2)
        assert any(f"blobs/{new.sha256[:2]}" in path or new.sha256 in path for path, _, _ in origin.served)


def publish_both(publisher: Publisher, new: File) -> tuple[str, str]:
    """Ways by `chunks` and by `zstd`; their names."""
    by_chunks = publish_delta(publisher, None, new, codec="chunks")
    whole = publish_delta(publisher, None, new, codec="zstd")
    write_index(publisher, new, by_chunks, whole)
    return by_chunks.name, whole.name


@pytest.mark.parametrize("metered", [False, True])
async def test_chunks_that_do_not_pay_are_no_failure(tmp_path: Path, metered: bool) -> None:
    publisher = Publisher(tmp_path / "home")
    push_weights(publisher, 1, weights())
    new = push_weights(publisher, 2, weights(seed=40))
    by_chunks, whole = publish_both(publisher, new)
    publisher.roll(1)
    errors = set()
    with serving(publisher) as origin:
        config = make_config(tmp_path, publisher, origin, metered=metered, on_delta_failure="fail")
        async with running(config) as agent:
            await settled(agent, stable=1)
            publisher.roll(2)
            await agent.check()

            def reached() -> bool:
                status = status_of(agent)
                errors.add(status.error)
                return status.state == "IDLE" and status.stable == 2

            await until(reached, "release 2 by its compressed file")
        served = [path for path, _, _ in origin.served]
    assert errors == {""}
    assert [sum(name in path for path in served) for name in (by_chunks, whole)] == [1, 1]
    assert not any("/blobs/" in path and new.sha256 in path for path in served)


async def test_a_payload_that_was_measured_is_fetched_once(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "home")
    push_weights(publisher, 1, weights())
    new = push_weights(publisher, 2, weights()[:300_000] + b"new" * 10_000 + weights()[300_000:])
    by_chunks, whole = publish_both(publisher, new)
    publisher.roll(1)
    with serving(publisher) as origin:
        async with running(make_config(tmp_path, publisher, origin, metered=True)) as agent:
            await settled(agent, stable=1)
            publisher.roll(2)
            await agent.check()
            await settled(agent, stable=2)
        served = [path for path, _, _ in origin.served]
    assert [sum(name in path for path in served) for name in (by_chunks, whole)] == [1, 0]
    staged = tmp_path / "store" / MODEL / "2"
    assert sorted(path.name for path in staged.iterdir() if path.name.startswith(".")) == []


def test_an_agent_that_applied_a_delta_is_as_small_as_before(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "home")
    old = push_weights(publisher, 1, weights())
    new = push_weights(publisher, 2, weights(changed=0.02))
    way = publish_delta(publisher, old, new)
    publisher.roll(1)
    with serving(publisher) as origin:
        agent = AgentProcess(make_config(tmp_path, publisher, origin, poll_s=0.2), tmp_path)
        agent.ready()
        agent.wait_for("release 1 is installed", "IDLE", stable=1)
        publisher.roll(2)
        agent.wait_for("release 2 is installed", "IDLE", stable=2)
        pid = agent.process.pid
        mapped, rss = Path(f"/proc/{pid}/maps").read_text(), Path(f"/proc/{pid}/statm").read_text().split()[1]
        assert agent.end(signal.SIGTERM) == 0
        assert any(way.name in path for path, _, _ in origin.served)
        assert not any(f"blobs/{new.sha256}" in path for path, _, _ in origin.served)
    assert "numpy" not in mapped
    assert "fastcdc" not in mapped
    assert int(rss) * os.sysconf("SC_PAGE_SIZE") <= RSS_BYTES_MAX
