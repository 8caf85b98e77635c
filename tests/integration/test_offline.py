"""A repository that is carried: exported, served by anything or nothing, and imported, verified at every step."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from model_sync.repository.layout import blob_path
from nearcast.cli import main
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES
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
from tests.patience import until


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    publisher = Publisher(tmp_path_factory.mktemp("publisher") / "home")
    publisher.push(1)
    publisher.push(2, scale=3.0, padding=2 * CHUNK_SIZE_BYTES)
    publisher.roll(1)
    publisher.roll(2)
    return publisher


@pytest.fixture(scope="module")
def origin(made: Publisher) -> Iterator[Origin]:
    with serving(made) as running_origin:
        yield running_origin


def nearcast(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def root_of(publisher: Publisher) -> Path:
    return publisher.folder / "operator" / "root.json"


def export(publisher: Publisher, origin: Origin, out: Path, *more: object) -> Result:
    return nearcast("export", out, "--from", f"{origin.url}/repository", "--root", root_of(publisher), *more)


@pytest.fixture
def copy(made: Publisher, origin: Origin, tmp_path: Path) -> Path:
    result = export(made, origin, tmp_path / "stick")
    assert result.exit_code == 0, result.output
    return tmp_path / "stick"


def folder_config(tmp_path: Path, publisher: Publisher, origin: Origin, repository: str) -> Any:
    return make_config(tmp_path, publisher, origin, repository=repository)


async def test_a_copy_is_a_repository_for_any_web_server(
    tmp_path: Path, made: Publisher, origin: Origin, copy: Path
) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(copy))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            config = folder_config(tmp_path, made, origin, f"http://127.0.0.1:{server.server_address[1]}")
            async with running(config) as agent:
                await settled(agent, stable=2)
        finally:
            server.shutdown()
            thread.join()


async def test_a_stick_is_a_repository(tmp_path: Path, made: Publisher, origin: Origin, copy: Path) -> None:
    async with running(folder_config(tmp_path, made, origin, copy.as_uri())) as agent:
        await settled(agent, stable=2)


def test_an_export_says_what_it_holds_and_for_how_long(
    tmp_path: Path, made: Publisher, origin: Origin, copy: Path
) -> None:
    again = json.loads(export(made, origin, copy, "--json").output)
    assert again["received_bytes"] == 0, "what is there and right is not fetched again"
    assert again["releases"] == {MODEL: [2]}
    assert again["first_to_expire"] == "timestamp"
    assert 0.9 * 86_400 < again["holds_s"] <= 86_400
    said = export(made, origin, copy).output
    assert "hold until" in said
    assert f"{MODEL}  2" in said
    refused = export(made, origin, tmp_path / "late", "--for", "3d")
    assert refused.exit_code != 0
    assert "The timestamp role of" in refused.output
    assert "has to hold for 72.0 h" in refused.output
    assert not (tmp_path / "late" / "metadata").exists()
    assert export(made, origin, tmp_path / "soon", "--for", "20h").exit_code == 0


def test_an_unknown_model_or_time_is_refused(tmp_path: Path, made: Publisher, origin: Origin) -> None:
    result = export(made, origin, tmp_path / "out", "--model", "nobody")
    assert "has no model nobody; it has: affine" in result.output
    assert export(made, origin, tmp_path / "out", "--for", "soon").exit_code == 2
    assert "Give either --store" in nearcast("import", tmp_path).output


def test_an_import_into_a_store_leaves_the_trial_to_the_node(
    tmp_path: Path, made: Publisher, origin: Origin, copy: Path
) -> None:
    store = tmp_path / "store"
    result = nearcast("import", copy, "--store", store, "--root", root_of(made), "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)["models"]
    assert (row["model"], row["stable"], row["error"]) == (MODEL, 2, "")
    assert Store(store).releases(MODEL) == (2,)
    assert not (store / ".agent" / "identity").exists()


async def test_the_node_goes_on_from_an_import(tmp_path: Path, made: Publisher, origin: Origin, copy: Path) -> None:
    import asyncio

    config = folder_config(tmp_path, made, origin, copy.as_uri())
    result = await asyncio.to_thread(nearcast, "import", copy, "--store", config.store, "--root", root_of(made))
    assert result.exit_code == 0, result.output
    before = len(origin.served)
    async with running(config) as agent:
        await settled(agent, stable=2)
        busy = await asyncio.to_thread(nearcast, "import", copy, "--mirror", tmp_path / "m", "--root", root_of(made))
        assert busy.exit_code == 0
    assert len(origin.served) == before, "nothing was asked of the network"


async def test_a_mirror_folder_serves_a_node_whose_repository_is_away(
    tmp_path: Path, made: Publisher, origin: Origin, copy: Path
) -> None:
    mirror = tmp_path / "mirror"
    result = nearcast("import", copy, "--mirror", mirror, "--root", root_of(made))
    assert result.exit_code == 0, result.output
    config = make_config(tmp_path, made, origin, repository="http://127.0.0.1:9", mirrors=(str(mirror),))
    async with running(config) as agent:
        await settled(agent, stable=2)


@pytest.mark.parametrize("what", ["blob", "timestamp", "manifest"])
async def test_a_copy_that_was_tampered_with(
    tmp_path: Path, made: Publisher, origin: Origin, copy: Path, what: str
) -> None:
    largest = max(made.repository.find(MODEL, 2).manifest.files, key=lambda entry: entry.size_bytes)
    place = {
        "blob": copy / blob_path(largest.sha256),
        "timestamp": copy / "metadata" / "timestamp.json",
        "manifest": next((copy / "targets" / "models" / MODEL).iterdir()),
    }[what]
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    result = nearcast("import", copy, "--mirror", tmp_path / "mirror", "--root", root_of(made))
    assert result.exit_code != 0 or "left out. Refused" in result.output, result.output
    assert not (tmp_path / "mirror" / "metadata" / "timestamp.json").exists() or what == "manifest"
    config = folder_config(tmp_path, made, origin, copy.as_uri())
    async with running(config) as agent:
        await until(lambda: "Refused" in agent._status.error + status_of(agent).error, "it is refused")
        assert status_of(agent).stable is None


def test_an_older_copy_does_not_replace_a_newer_one(tmp_path: Path, made: Publisher, origin: Origin) -> None:
    older, mirror = tmp_path / "older", tmp_path / "mirror"
    assert export(made, origin, older).exit_code == 0
    made.roll(2)
    newer = tmp_path / "newer"
    assert export(made, origin, newer).exit_code == 0
    assert nearcast("import", newer, "--mirror", mirror, "--root", root_of(made)).exit_code == 0
    kept = (mirror / "metadata" / "timestamp.json").read_bytes()
    result = nearcast("import", older, "--mirror", mirror, "--root", root_of(made))
    assert "older than what is known" in result.output
    assert (mirror / "metadata" / "timestamp.json").read_bytes() == kept
