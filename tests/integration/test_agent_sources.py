"""Where the agent reads from: folders, object stores, mirrors that fail, lie, dawdle, or ask for a pause."""

from __future__ import annotations

import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent.install.fetch import Download, Patience, Remote
from model_sync.agent.sources.addresses import make_source
from model_sync.agent.sources.folder_source import FolderSource
from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.meter import Meter
from model_sync.agent.sources.mirrors import Mirrors, SharedHealth
from model_sync.agent.sources.source import StatusError
from model_sync.repository.layout import blob_path
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import MeshError
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File
from tests.integration.agent_parts import (
    MODEL,
    Origin,
    Publisher,
    make_config,
    running,
    serving,
    settled,
    status_of,
)
from tests.integration.delta_parts import push_weights, weights
from tests.patience import own_time, until

TIMES = {"connect_timeout_s": 5.0, "timeout_s": 5.0}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "home")
    made.entry = push_weights(made, 1, weights())  # type: ignore[attr-defined]
    made.roll(1)
    return made


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


@pytest.fixture
def mirror(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


def blobs(origin: Origin) -> list[str]:
    return [path for path, _, _ in origin.served if "/blobs/" in path]


def refuse(status: int, headers: dict[str, str]) -> Any:
    def fault(handler: Any, path: str, data: bytes) -> bool:
        del path, data
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        return True

    return fault


@pytest.mark.parametrize("as_url", [True, False])
async def test_a_folder_is_a_repository(tmp_path: Path, publisher: Publisher, origin: Origin, as_url: bool) -> None:
    folder = publisher.repository.folder
    origin.close()
    config = make_config(tmp_path, publisher, origin, repository=folder.as_uri() if as_url else str(folder))
    async with running(config) as agent:
        await settled(agent, stable=1)


def test_a_folder_gives_nothing_from_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    repository = tmp_path / "repository"
    (repository / "sub").mkdir(parents=True)
    (repository / "file").write_bytes(b"0123456789")
    source = FolderSource(repository)
    assert b"".join(source.get("file", start=2, end=5, timeout_s=1.0)[1]) == b"234"
    assert source.read("/file", size_bytes_max=10, timeout_s=1.0) == b"0123456789"
    for path in ("../secret", "%2e%2e/secret", "sub/../../secret", "sub%2f..%2f..%2fsecret", "absent", "file/x", ""):
        with pytest.raises(StatusError) as refused:
            source.get(path, timeout_s=1.0)
        assert refused.value.status == 404
    with pytest.raises(StatusError):
        source.get("sub", timeout_s=1.0)
    with pytest.raises(MeshError, match="longer than 9 bytes"):
        source.read("file", size_bytes_max=9, timeout_s=1.0)


@pytest.mark.parametrize("url", ["ftp://x/y", "", "file://other/share", "s3:///x"])
def test_addresses_of_nothing_are_refused(url: str) -> None:
    with pytest.raises(MeshError):
        make_source(url, tls=None, **TIMES)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real S3 protocol on loopback, from an environment of its own."""
    python = Path(__file__).parents[2] / ".venv-s3/bin/python"
    if not python.exists():
        pytest.skip(".venv-s3 is missing; `make test` makes it")
    command = [python, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", url)
                patch.setenv("AWS_ACCESS_KEY_ID", "test")
                patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
                patch.setenv("AWS_REGION", "us-east-1")
                urllib.request.urlopen(urllib.request.Request(f"{url}/models", method="PUT"), timeout=10).close()
                yield "s3://models/fleet"
        finally:
            server.kill()


async def test_an_object_store_is_a_repository(
    tmp_path: Path, publisher: Publisher, origin: Origin, bucket: str
) -> None:
    from obstore.store import S3Store

    store = S3Store("models", prefix="fleet", client_options={"allow_http": True})
    for path in publisher.repository.folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(publisher.repository.folder).as_posix(), path.read_bytes())
    origin.close()
    config = make_config(tmp_path, publisher, origin, repository=bucket)
    async with running(config) as agent:
        await settled(agent, stable=1)
    source = make_source(bucket, tls=None, **TIMES)
    entry: File = publisher.entry  # type: ignore[attr-defined]
    whole = (publisher.repository.folder / blob_path(entry.sha256)).read_bytes()
    offset, pieces = source.get(blob_path(entry.sha256), start=CHUNK_SIZE_BYTES - 5, timeout_s=5.0)
    assert (offset, b"".join(pieces)) == (CHUNK_SIZE_BYTES - 5, whole[CHUNK_SIZE_BYTES - 5 :])
    with pytest.raises(StatusError) as refused:
        source.get("absent", timeout_s=5.0)
    assert refused.value.status == 404


async def test_a_mirror_steps_in_when_the_repository_is_down(
    tmp_path: Path, publisher: Publisher, origin: Origin, mirror: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, mirrors=(f"{mirror.url}/repository",))
    origin.close()
    async with running(config) as agent:
        await settled(agent, stable=1)
    assert blobs(mirror)


async def test_a_mirror_that_lies_is_left_for_another(
    tmp_path: Path, publisher: Publisher, origin: Origin, mirror: Origin
) -> None:
    entry: File = publisher.entry  # type: ignore[attr-defined]

    def lie(handler: Any, path: str, data: bytes) -> bool:
        if entry.sha256 not in path:
            return False
        mirror.reply(handler, 200, data[:CHUNK_SIZE_BYTES] + b"\0" * (len(data) - CHUNK_SIZE_BYTES))
        return True

    origin.fault = lie
    config = make_config(tmp_path, publisher, origin, mirrors=(f"{mirror.url}/repository",))
    async with running(config) as agent:
        await settled(agent, stable=1)
        assert status_of(agent).quarantined == ()
    again = [(start, size) for path, start, size in mirror.served if entry.sha256 in path]
    assert again == [(CHUNK_SIZE_BYTES, entry.size_bytes - CHUNK_SIZE_BYTES)], "what was right is kept"


async def test_a_slow_source_is_left_while_there_is_another(
    tmp_path: Path, publisher: Publisher, origin: Origin, mirror: Origin
) -> None:
    def dawdle(handler: Any, path: str, data: bytes) -> bool:
        if "/blobs/" not in path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for at in range(0, len(data), 100):
            handler.wfile.write(data[at : at + 100])
            handler.wfile.flush()
            time.sleep(0.01)
        return True

    origin.fault = dawdle
    limits = {"source_bytes_per_s_min": 1024 * 1024, "chunk_timeout_s": 60.0}
    config = make_config(tmp_path, publisher, origin, mirrors=(f"{mirror.url}/repository",), limits=limits)
    began = own_time()
    async with running(config) as agent:
        await settled(agent, stable=1)
    assert own_time() - began < 15.0
    assert blobs(mirror)


async def test_a_pause_that_is_asked_for_is_kept(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        push_weights(publisher, 2, weights(seed=3))
        publisher.roll(2)
        asked: list[float] = []

        def busy(handler: Any, path: str, data: bytes) -> bool:
            if "/blobs/" in path and len(asked) < 2:
                asked.append(time.monotonic())
                return bool(refuse(503, {"Retry-After": "1"})(handler, path, data))
            return False

        origin.fault = busy
        await agent.check()
        await settled(agent, stable=2)
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.95


def download(tmp_path: Path, url: str, entry: File, **bounds: float) -> float:
    """Seconds that one blob takes."""
    rate = bounds.get("bytes_per_s_max", 0.0)
    mirrors = Mirrors([HttpSource(url, tls=None, connect_timeout_s=5.0)], SharedHealth(1))
    meter = Meter(tmp_path / "spent.json", SYSTEM_CLOCK, bytes_per_s_max=rate, bytes_per_day_max=0)
    remote = Remote(path=blob_path(entry.sha256), size_bytes=entry.size_bytes, sha256=entry.sha256, chunks=entry.chunks)
    began = time.monotonic()
    patience = Patience(chunk_timeout_s=0.3)
    Download(remote, tmp_path / "blob", mirrors, pace=meter, patience=patience, stop=threading.Event()).run()
    mirrors.close()
    return time.monotonic() - began


def test_our_own_rate_is_no_slow_source(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    entry: File = publisher.entry  # type: ignore[attr-defined]
    rate = 600_000.0
    took_s = download(tmp_path, f"{origin.url}/repository", entry, bytes_per_s_max=rate)
    assert took_s >= 0.7 * (entry.size_bytes - rate / 4) / rate, "it was held back"
    assert len(blobs(origin)) == 1, "and never given up, though each chunk took longer than the timeout"


async def test_a_days_budget_holds_the_download_and_the_node_serves_on(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, limits={"download_bytes_per_day_max": 800_000})
    async with running(config) as agent:
        await settled(agent, stable=1)
    push_weights(publisher, 2, weights(seed=3))
    publisher.roll(2)
    async with running(config) as agent:
        await until(lambda: "download_bytes_per_day_max" in status_of(agent).error, "the budget is spoken of")
        assert status_of(agent).stable == 1
        assert status_of(agent).received_bytes == 0


async def test_what_nobody_needs_goes_first_and_what_serves_never(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    """Room for three releases: partial downloads and old versions go, stable and last good stay."""
    config = make_config(tmp_path, publisher, origin, limits={"quota_bytes": 2_100_000})
    store = Store(Path(config.store))
    async with running(config) as agent:
        await settled(agent, stable=1)
        for release in range(2, 5):
            push_weights(publisher, release, weights(seed=release))
            stale = store.stage_folder(MODEL, 90 + release)
            (stale / "model.onnx").write_bytes(b"x" * 500_000)
            publisher.roll(release)
            await agent.check()
            await settled(agent, stable=release)
            assert store.releases(MODEL) == (release - 1, release), "the last good stays"
    pointer = store.pointer(MODEL)
    assert pointer is not None
    assert (pointer.stable, pointer.last_good) == (4, 3)


async def test_no_room_holds_and_takes_nothing_that_serves(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, limits={"quota_bytes": 1_500_000})
    store = Store(Path(config.store))
    async with running(config) as agent:
        await settled(agent, stable=1)
        push_weights(publisher, 2, weights(seed=2))
        publisher.roll(2)
        await agent.check()
        await settled(agent, stable=2)
        push_weights(publisher, 3, weights(seed=3))
        publisher.roll(3)
        origin.served.clear()
        await agent.check()
        await until(lambda: "Not enough quota" in status_of(agent).error, "it says so")
        assert store.releases(MODEL) == (1, 2)
        assert blobs(origin) == [], "before anything is fetched"


async def test_a_newer_intent_ends_a_download_within_one_chunk(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, limits={"download_bytes_per_s_max": 200_000})
    big = weights(seed=8) * 4
    async with running(config) as agent:
        await settled(agent, stable=1)
        entry = push_weights(publisher, 2, big)
        publisher.roll(2)
        await agent.check()
        await until(lambda: status_of(agent).state == "FETCH", "the large release is on its way")
        before = status_of(agent).received_bytes
        publisher.roll(1)
        await agent.check()
        assert await until(lambda: status_of(agent).state == "IDLE", "the older release is wanted again") < 2.0
        assert await until(lambda: not agent._shells[MODEL]._working.locked(), "the thread has noticed") < 4.0
        assert status_of(agent).received_bytes - before < entry.size_bytes / 2


async def test_a_check_keeps_the_pause_too(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin)
    origin.fault = refuse(503, {"Retry-After": "7"})
    async with running(config) as agent:
        assert not await agent.check()
        assert 7.0 <= agent._pause_s() < 10.0
        seen = len(origin.served)
        assert not await agent.check()
        assert "left alone" in agent._status.error
        assert len(origin.served) == seen


async def test_a_repository_with_forged_metadata_is_left_for_its_mirror(
    tmp_path: Path, publisher: Publisher, origin: Origin, mirror: Origin
) -> None:
    def forge(handler: Any, path: str, data: bytes) -> bool:
        if not path.endswith("timestamp.json"):
            return False
        origin.reply(handler, 200, data.replace(b'"version":', b'"version": 9'))
        return True

    origin.fault = forge
    config = make_config(tmp_path, publisher, origin, mirrors=(f"{mirror.url}/repository",))
    async with running(config) as agent:
        await settled(agent, stable=1)
        assert agent._status.error == ""
