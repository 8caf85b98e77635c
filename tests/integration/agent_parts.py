"""A signed repository, a web server that can misbehave, and agents on it: what the agent's tests are made of."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from tuf.api.metadata import Metadata, Targets

from model_sync.agent.app import Agent
from model_sync.agent.config import AgentConfig, AgentLimits
from model_sync.agent.status import ModelStatus
from model_sync.publisher.keys import init_keys
from model_sync.repository.layout import blob_path, encode_metadata, make_target, models_path
from model_sync.repository.repository import Repository
from model_sync.repository.signing_key import load_key
from model_sync.rollout.document import ChannelDocument, Pick, Rollout
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.store import Manifest, Store
from tests.patience import until
from tests.tiny_models import affine_model, write_version

MODEL = "affine"
WAIT_S = 20.0


class Publisher:
    """Keys and a repository, driven directly. `root` is what nodes pin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        init_keys(folder)
        self.repository = Repository(folder / "sync" / "repository", load_key(folder / "sync" / "online.pem"))
        self.key = load_key(folder / "operator" / "models-core.pem")
        self.root = (folder / "operator" / "root.json").read_bytes()
        self.role = self._read_role()
        self.intent = 0
        self.picks: dict[int, Pick] = {}

    def _read_role(self) -> Metadata[Targets]:
        return Metadata[Targets].from_file(str(self.repository.folder / "metadata" / "1.models-core.json"))

    def push(self, release: int, *, scale: float = 2.0, expected: float | None = None, padding: int = 0) -> Manifest:
        """A real model with a golden vector; `expected` another scale makes the gate fail; `padding` extra bytes."""
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        y = x * np.float32(scale if expected is None else expected)
        # Text, as a version may hold it; each release has its own.
        notes = np.random.default_rng(release).bytes(padding).hex()[:padding].encode()
        extra = {"notes.txt": notes} if padding else {}
        return self.push_model(release, affine_model(scale), golden=(({"x": x}, {"y": y}),), extra=extra)

    def push_model(self, release: int, model: bytes, **fields: Any) -> Manifest:
        """Any model; `fields` as in `write_version`."""
        folder = self.folder / f"bundle-{release}"
        rollback_ok = tuple(range(max(1, release - 2), release))
        manifest = write_version(folder, model, name=MODEL, release=release, rollback_ok=rollback_ok, **fields)
        return self.push_folder(folder, manifest)

    def push_folder(self, folder: Path, manifest: Manifest) -> Manifest:
        """A finished bundle, sealed or not."""
        release = manifest.release
        for entry in manifest.files:
            place = self.repository.folder / blob_path(entry.sha256)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes((folder / entry.path).read_bytes())
        path, data = models_path(MODEL, release), manifest.encode()
        role = deepcopy(self.role)
        role.signed.targets[path] = make_target(path, data)
        role.signed.version += 1
        role.sign(self.key)
        self.repository.publish_models("core", encode_metadata(role), {path: data})
        self.role = role
        self.picks[release] = Pick(
            release=release, manifest_sha256=self.repository.find(MODEL, release).manifest_sha256
        )
        return manifest

    def roll(self, stable: int | Pick, candidate: int | None = None, **fields: Any) -> int:
        """Sign the next channel document, whatever it says; returns the serial."""
        self.intent += 1
        rollout = Rollout(
            model=MODEL,
            stable=stable if isinstance(stable, Pick) else self.picks[stable],
            candidate=self.picks[candidate] if candidate else None,
            **fields,
        )
        document = ChannelDocument(channel="stable", intent=self.intent, rollouts=(rollout,))
        return self.repository.publish_channel(document)


class Origin:
    """Serves a repository over HTTP/1.1 with ranges and the hint. `fault` may take over a request."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.served: list[tuple[str, int, int]] = []
        self.fault: Callable[[http.server.BaseHTTPRequestHandler, str, bytes], bool] | None = None
        self.closed = False
        self._changed = threading.Condition()
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                origin.answer(self)

            def log_message(self, *_: Any) -> None:
                return

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                return

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        if self.closed:  # kept connections outlive the listener
            handler.close_connection = True
            return
        path, _, query = handler.path.partition("?")
        if path == "/v1/hint":
            since = int(dict(part.split("=") for part in query.split("&"))["since"])
            with self._changed:
                self._changed.wait_for(lambda: self.publisher.repository.serial > since, timeout=2.0)
            self.reply(handler, 200, json.dumps({"serial": self.publisher.repository.serial}).encode())
            return
        place = self.publisher.repository.folder / path.removeprefix("/repository/")
        if not place.is_file():
            self.reply(handler, 404, b"absent")
            return
        data = place.read_bytes()
        if self.fault is not None and self.fault(handler, path, data):
            return
        start, end = range_of(handler, len(data))
        self.served.append((path, start, end - start))
        if (start, end) != (0, len(data)):
            extra = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            self.reply(handler, 206, data[start:end], extra)
        else:
            self.reply(handler, 200, data)

    def reply(
        self, handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes, extra: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.notify()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def range_start(handler: http.server.BaseHTTPRequestHandler) -> int:
    return range_of(handler, 0)[0]


def range_of(handler: http.server.BaseHTTPRequestHandler, size_bytes: int) -> tuple[int, int]:
    """First byte asked for, and the one after the last."""
    first, _, last = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")
    return int(first or 0), int(last) + 1 if last else size_bytes


@contextlib.contextmanager
def serving(publisher: Publisher) -> Iterator[Origin]:
    origin = Origin(publisher)
    try:
        yield origin
    finally:
        origin.close()


def make_config(folder: Path, publisher: Publisher, origin: Origin, **fields: Any) -> AgentConfig:
    """An agent that checks only when told to, unless `fields` say otherwise."""
    identity = folder / "identity"
    identity.mkdir(parents=True, exist_ok=True)
    (identity / "root.json").write_bytes(publisher.root)
    limits = {"backoff_base_s": 0.05, "backoff_cap_s": 0.2, "chunk_timeout_s": 5.0} | fields.pop("limits", {})
    defaults: dict[str, Any] = {
        "repository": f"{origin.url}/repository",
        "identity": str(identity),
        "store": str(folder / "store"),
        "poll_s": 600.0,
        "probation_s": 0.2,
    }
    return AgentConfig(**{**defaults, **fields}, limits=AgentLimits(**limits))


@contextlib.asynccontextmanager
async def running(config: AgentConfig, *, clock: Clock = SYSTEM_CLOCK, store: Store | None = None) -> Any:
    agent = Agent(config, clock=clock, store=store)
    try:
        await agent.start()
        yield agent
    finally:
        await agent.close()


def status_of(agent: Agent) -> ModelStatus:
    shell = agent._shells.get(MODEL)
    return shell.status if shell is not None else ModelStatus(state="ABSENT")


async def settled(agent: Agent, *, stable: int, candidate: int | None = None) -> None:
    """Wait until the agent rests with this pointer."""

    def reached() -> bool:
        status = status_of(agent)
        return (status.state, status.stable, status.candidate) == ("IDLE", stable, candidate)

    try:
        await until(reached, "")
    except AssertionError:
        raise AssertionError(f"wanted stable {stable}, candidate {candidate}, got {status_of(agent)}") from None
