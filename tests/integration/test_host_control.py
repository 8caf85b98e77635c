"""The control socket and `nearcast models list`, over a real Unix socket and a real store."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nearcast.cli.models import command
from nearcast.errors import Code, MeshError
from nearcast.serving import ModelHost
from nearcast.serving.control import CONNECTIONS_MAX, LINE_SIZE_BYTES_MAX, ControlRequest, ControlSocket, ask
from nearcast.store import Store
from tests.tiny_models import activate, affine_model, install


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Store, Path]]:
    store = Store(tmp_path / "store")
    install(store, affine_model())
    activate(store, stable=1)
    host = ModelHost(store, node="edge-1", tier="local")
    await host.start()
    control = ControlSocket(host, tmp_path / "host.sock")
    await control.start()
    yield store, tmp_path / "host.sock"
    await control.close()
    await host.close()
    assert not (tmp_path / "host.sock").exists()


async def talk(path: Path, *lines: bytes) -> list[Any]:
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 20)
    answers = []
    for line in lines:
        writer.write(line + b"\n")
        answers.append(json.loads(await asyncio.wait_for(reader.readline(), 10)))
    writer.close()
    await writer.wait_closed()
    return answers


async def test_refresh_and_stats_answer_with_the_versions(served: tuple[Store, Path]) -> None:
    store, path = served
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    install(store, affine_model(), release=2)
    install(store, b"broken", release=3)
    activate(store, stable=2, candidate=3, last_good=1)
    refresh, stats, models = await talk(
        path, b'{"op":"refresh","model":"affine"}', b'{"op":"stats","model":"affine"}', b'{"op":"models"}'
    )
    assert refresh == stats
    assert refresh["ok"] is True
    assert refresh["model"] == "affine"
    assert [(v["release"], v["state"]) for v in refresh["versions"]] == [(1, "hot"), (2, "hot"), (3, "failed")]
    assert "cannot load" in refresh["versions"][2]["error"]
    assert {"requests", "errors", "p50_us", "p99_us"} <= refresh["versions"][0].keys()
    assert models["models"] == [{"model": "affine", "versions": refresh["versions"]}]


async def test_the_operator_loads_and_unloads(served: tuple[Store, Path]) -> None:
    _, path = served
    unload, load, unknown = await talk(
        path,
        b'{"op":"unload","model":"affine"}',
        b'{"op":"load","model":"affine"}',
        b'{"op":"load","model":"none"}',
    )
    assert [version["state"] for version in unload["versions"]] == ["cold"]
    assert [version["state"] for version in load["versions"]] == ["hot"]
    assert "it has: affine" in unknown["error"]


async def test_bad_lines_get_an_error_line_and_the_next_one_works(served: tuple[Store, Path]) -> None:
    _, path = served
    *bad, good = await talk(
        path,
        b"not json",
        b"",
        b'{"op":"format disk"}',
        b'{"op":"refresh","model":"affine","extra":1}',
        b'{"op":"refresh","model":"unknown"}',
        b'{"op":"refresh","model":"../../etc"}',
        b'{"op":"stats","model":"affine","wait_s":-1}',
        b"\xff\xfe",
        b'{"op":"stats","model":"affine"}',
    )
    assert all(answer["ok"] is False and answer["error"] for answer in bad)
    assert good["ok"] is True


async def test_long_lines_end_the_connection_and_nothing_else(served: tuple[Store, Path]) -> None:
    _, path = served
    (answer,) = await talk(path, b"x" * (2 * LINE_SIZE_BYTES_MAX))
    assert answer == {"ok": False, "error": f"A line may have at most {LINE_SIZE_BYTES_MAX} bytes."}
    assert (await talk(path, b'{"op":"models"}'))[0]["ok"] is True


async def test_connections_are_bounded(served: tuple[Store, Path]) -> None:
    _, path = served
    held = [await asyncio.open_unix_connection(str(path)) for _ in range(CONNECTIONS_MAX)]
    for reader, writer in held:
        writer.write(b'{"op":"models"}\n')
        assert json.loads(await reader.readline())["ok"] is True
    held.append(await asyncio.open_unix_connection(str(path)))
    assert json.loads(await held[-1][0].readline())["ok"] is False
    for _, writer in held:
        writer.close()


async def test_a_second_node_on_the_same_socket_is_refused(served: tuple[Store, Path], tmp_path: Path) -> None:
    store, path = served
    host = ModelHost(store, node="edge-2", tier="local")
    with pytest.raises(MeshError, match="Another node runs on this data directory"):
        await ControlSocket(host, path).start()
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(MeshError, match="taken by another file"):
        await ControlSocket(host, tmp_path / "file").start()
    assert (tmp_path / "file").read_bytes() == b"precious"
    with pytest.raises(MeshError, match="shorter data directory"):
        await ControlSocket(host, tmp_path / ("x" * 120)).start()
    await host.close()


async def test_a_dead_nodes_socket_is_replaced(served: tuple[Store, Path], tmp_path: Path) -> None:
    import socket

    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    host = ModelHost(served[0], node="edge-2", tier="local")
    control = ControlSocket(host, stale)
    await control.start()
    assert (await talk(stale, b'{"op":"models"}'))[0] == {"ok": True, "models": []}
    await control.close()
    await host.close()


async def test_ask_and_the_command_line(served: tuple[Store, Path]) -> None:
    store, path = served
    answer = await asyncio.to_thread(ask, path, ControlRequest(op="stats", model="affine"))
    assert answer["versions"][0]["state"] == "hot"
    with pytest.raises(MeshError) as caught:
        await asyncio.to_thread(ask, path.with_name("none.sock"), ControlRequest(op="models"))
    assert caught.value.code is Code.UNAVAILABLE
    with pytest.raises(MeshError, match="is not on this node; it has: affine"):
        await asyncio.to_thread(ask, path, ControlRequest(op="stats", model="other"))

    async def run(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, command, ["list", *arguments], None, None, False)
        return result.output

    stored = json.loads(await run("--store", str(store.root), "--json"))["models"]
    assert stored[0]["versions"][0]["roles"] == ["stable"]
    live = json.loads(await run("--socket", str(path), "--json"))["models"]
    assert live[0]["versions"][0]["state"] == "hot"
    assert "stable" in await run("--store", str(store.root))
    assert "hot" in await run("--socket", str(path))
    (store.root / "affine" / "serving.json").write_bytes(b"{")
    assert "torn or malformed" in await run("--store", str(store.root))
