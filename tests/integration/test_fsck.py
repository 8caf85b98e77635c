"""A store after bad sectors, torn writes and strange hands: what fsck finds, and what it brings back."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from model_sync.agent.config import AgentConfig
from nearcast.cli import main
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, serving, settled

FILE = f"{MODEL}/2/notes.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    publisher = Publisher(tmp_path_factory.mktemp("publisher") / "home")
    publisher.push(1)
    publisher.push(2, scale=3.0, padding=5 * CHUNK_SIZE_BYTES + 17)
    publisher.roll(1)
    publisher.roll(2)
    return publisher


@pytest.fixture(scope="module")
def origin(made: Publisher) -> Iterator[Origin]:
    with serving(made) as running_origin:
        yield running_origin


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, made: Publisher, origin: Origin) -> Path:
    folder = tmp_path_factory.mktemp("node")

    async def install() -> None:
        async with running(make_config(folder, made, origin)) as agent:
            await settled(agent, stable=2)

    asyncio.run(install())
    return folder


@pytest.fixture
def config(tmp_path: Path, installed: Path, made: Publisher, origin: Origin) -> AgentConfig:
    shutil.copytree(installed / "store", tmp_path / "store", symlinks=True)
    return make_config(tmp_path, made, origin)


def fsck(config: AgentConfig, origin: Origin, *, repair: bool = False) -> tuple[int, dict[str, Any]]:
    arguments = ["models", "fsck", "--store", config.store, "--json"]
    arguments += ["--repair", "--from", f"{origin.url}/repository"] if repair else []
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, json.loads(result.stdout)


def whole(config: AgentConfig) -> dict[str, bytes]:
    """The bytes of all versions."""
    root = Path(config.store) / MODEL
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_store_without_a_fault(config: AgentConfig, origin: Origin) -> None:
    code, report = fsck(config, origin)
    assert (code, report["faults"], report["is_whole"]) == (0, [], True)
    assert (report["models"], report["releases"]) == (1, 1)
    text = CliRunner().invoke(main, ["models", "fsck", "--store", config.store]).stdout
    assert "1 models, 1 releases, 3 files: all fine." in text


def test_only_the_bad_chunks_are_fetched_again(config: AgentConfig, origin: Origin) -> None:
    before = whole(config)
    path = Path(config.store) / FILE
    data = bytearray(path.read_bytes())
    for chunk in (1, 4):
        data[chunk * CHUNK_SIZE_BYTES + 5] ^= 1
    path.write_bytes(data)
    code, report = fsck(config, origin)
    assert code == 1
    (fault,) = report["faults"]
    assert fault["path"] == FILE
    assert "2 of its 6 chunks are not the signed ones" in fault["problem"]
    assert fault["repair"] == ""
    assert whole(config) != before, "without --repair nothing is touched"
    code, report = fsck(config, origin, repair=True)
    assert (code, report["is_whole"]) == (0, True)
    assert 2 * CHUNK_SIZE_BYTES <= report["received_bytes"] <= 3 * CHUNK_SIZE_BYTES
    assert whole(config) == before
    assert fsck(config, origin)[1]["faults"] == []


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: CHUNK_SIZE_BYTES + 7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("harm", "problem"),
    [(shorten, "chunks are not"), (lengthen, "longer than signed"), (Path.unlink, "missing")],
    ids=["short", "long", "missing"],
)
def test_files_of_a_version(config: AgentConfig, origin: Origin, harm: Callable[[Path], Any], problem: str) -> None:
    before = whole(config)
    harm(Path(config.store) / FILE)
    code, report = fsck(config, origin, repair=True)
    assert (code, whole(config) == before) == (0, True)
    assert problem in report["faults"][0]["problem"]


AGENT_FILES = [
    "metadata/timestamp.json", "metadata/snapshot.json", "metadata/targets.json", "metadata/rollout.json",
    "metadata/models-core.json", "metadata/root_history/1.root.json", "clock.json",
]  # fmt: skip


@pytest.mark.parametrize("name", AGENT_FILES)
async def test_what_the_agent_keeps_is_taken_away_and_made_again(
    config: AgentConfig, origin: Origin, name: str
) -> None:
    path = Path(config.store) / ".agent" / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    code, report = await asyncio.to_thread(fsck, config, origin)
    assert code == 1
    assert f".agent/{name}" in [fault["path"] for fault in report["faults"]]
    code, report = await asyncio.to_thread(fsck, config, origin, repair=True)
    assert (code, report["is_whole"]) == (0, True)
    async with running(config) as agent:
        assert await agent.check(), agent._status.error
        await settled(agent, stable=2)
    assert (await asyncio.to_thread(fsck, config, origin))[1]["faults"] == []


def test_a_forged_role_is_found(config: AgentConfig, origin: Origin) -> None:
    path = Path(config.store) / ".agent" / "metadata" / "rollout.json"
    path.write_bytes(path.read_bytes().replace(b'"version":', b'"version":1'))
    assert "not signed by the keys that count now" in fsck(config, origin)[1]["faults"][0]["problem"]


async def test_pointer_journal_manifest_and_strangers(config: AgentConfig, origin: Origin) -> None:
    store = Path(config.store)
    before = whole(config)
    (store / MODEL / "serving.json").write_bytes(b'{"stable":')
    with (store / ".agent" / "journal").open("ab") as journal:
        journal.write(b"00000000 {torn")
    (store / MODEL / "2" / "manifest.json").write_bytes(b"{}")
    (store / MODEL / "2" / "stranger.bin").write_bytes(b"x")
    staged = store / ".staging" / MODEL / "3"
    staged.mkdir(parents=True)
    (staged / "model.onnx").symlink_to("/etc/passwd")
    code, report = await asyncio.to_thread(fsck, config, origin)
    assert code == 1
    assert len(report["faults"]) == 4, "a version without a manifest is not looked into"
    code, report = await asyncio.to_thread(fsck, config, origin, repair=True)
    assert (code, len(report["faults"])) == (0, 5)
    async with running(config) as agent:
        await settled(agent, stable=2)
    assert {name: data for name, data in whole(config).items() if name != "serving.json"} == {
        name: data for name, data in before.items() if name != "serving.json"
    }
    assert Store(store).pointer(MODEL) is not None


async def test_a_running_agent_is_not_disturbed(config: AgentConfig, origin: Origin) -> None:
    async with running(config):
        result = await asyncio.to_thread(CliRunner().invoke, main, ["models", "fsck", "--store", config.store])
    assert result.exit_code == 75
    assert "stop the node first" in result.output


def test_a_source_that_lies_repairs_nothing(config: AgentConfig, origin: Origin) -> None:
    path = Path(config.store) / FILE
    shorten(path)
    harmed = path.read_bytes()
    origin.fault = lambda handler, asked, data: bool(
        "/blobs/" in asked and (origin.reply(handler, 200, bytes(len(data))) or True)
    )
    try:
        code, report = fsck(config, origin, repair=True)
    finally:
        origin.fault = None
    assert code == 1
    assert "could not be repaired: Refused chunk" in report["faults"][0]["problem"]
    assert path.read_bytes() == harmed
