"""A life of a real agent, recorded: it installs, updates, tries, commits, returns, quarantines, collects, is killed."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.crash_points import STORE
from benchmarks.crash_trace import Call, read_trace, record_prefix
from model_sync.agent.status import ModelStatus, read_status
from nearcast.store.manifest import File
from tests.integration.agent_parts import MODEL, Origin, Publisher, serving
from tests.integration.delta_parts import GOLDEN, model_with, publish_delta, weights

WAIT_S = 30.0
PADDING_BYTES = 300_000
"""More than one chunk, so that files can be torn between chunks."""
LAST_PADDING_BYTES = 1_500_000


@dataclass(slots=True)
class Recording:
    """What was recorded: the calls below `folder`, and what the world knew.

    `final` is the release that the repository at `repository`, of that serial, wants.
    """

    folder: Path
    repository: Path
    serial: int
    root: bytes
    calls: list[Call] = field(default_factory=list)
    manifests: dict[int, str] = field(default_factory=dict)
    final: int = 0

    def save(self, path: Path) -> None:
        """Write it for the worker processes."""
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def load(path: Path) -> Recording:
        """Read what `save` wrote."""
        found = pickle.loads(path.read_bytes())
        assert isinstance(found, Recording)
        return found


class ScriptedHost:
    """Speaks the control protocol of a model host whose versions answer well, but for those in `bad`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad: set[int] = set()
        self._asked = 0
        host = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.rfile.readline()
                with suppress(ConnectionError):  # the agent was killed while it asked
                    self.wfile.write(host.answer())

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self._server = Server(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer(self) -> bytes:
        """Every version is hot; each question finds ten more requests, all of them failed for a bad version."""
        self._asked += 10
        versions = [
            {"release": release, "state": "hot", "requests": self._asked, "errors": self._asked * (release in self.bad)}
            for release in range(1, 100)
        ]
        return json.dumps({"ok": True, "versions": versions}).encode() + b"\n"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class AgentProcess:
    """`python -m model_sync.agent` on the disk of `home`, run by what stands in `prefix`, like a tracer."""

    def __init__(
        self, home: Path, repository: str, number: int = 0, *, prefix: Sequence[str] = (), **fields: object
    ) -> None:
        self.store = home / "disk" / STORE
        path = home / f"agent-{number}.toml"
        settings = {
            "repository": repository,
            "identity": str(home / "identity"),
            "store": str(self.store),
            "poll_s": 0.2,
            "probation_s": 0.15,
            **fields,
        }
        path.write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
            + "[limits]\nbackoff_base_s = 0.05\nbackoff_cap_s = 0.2\nfree_bytes_min = 0\n"
        )
        command = [sys.executable, "-m", "model_sync.agent", "--config", str(path), "--set", "log_level=error"]
        self._before = read_status(self.store)
        self.process = subprocess.Popen([*prefix, *command], stdout=subprocess.PIPE)

    def model(self) -> ModelStatus | None:
        """What this process says of the model; None while it has not spoken."""
        status = read_status(self.store)
        if status is None or (self._before is not None and status.pid == self._before.pid):
            return None
        return status.models.get(MODEL)

    def until(self, what: str, reached: Callable[[ModelStatus], bool]) -> None:
        """Wait until the agent says so of the model.

        Raises:
            RuntimeError: if it ends before, or takes too long.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            model = self.model()
            if model is not None and reached(model):
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"it never came true: {what}; {model}, exit {self.process.poll()}")
            time.sleep(0.002)

    def rests(self, stable: int, **fields: object) -> None:
        """Wait until it is idle with this pointer."""

        def reached(status: ModelStatus) -> bool:
            same = all(getattr(status, name) == value for name, value in fields.items())
            return status.state == "IDLE" and status.stable == stable and same

        self.until(f"it rests with {stable} {fields}", reached)

    def end(self, number: int) -> None:
        """Send a signal to the agent, not to its tracer, and wait for both."""
        status = read_status(self.store)
        if self.model() is not None and status is not None:
            os.kill(status.pid, number)
        else:
            self.process.send_signal(number)
        self.close()

    def close(self) -> None:
        """Wait for its end."""
        self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Stage:
    """A publisher, an origin, a host and one agent at a time, on one disk."""

    def __init__(self, home: Path, origin: Origin, host: ScriptedHost) -> None:
        self.home = home
        self.publisher: Publisher = origin.publisher
        self.origin = origin
        self.host = host
        self.release = 0
        self.agents: list[AgentProcess] = []
        self.traces: list[Path] = []

    @property
    def repository(self) -> str:
        """Where agents find everything."""
        return f"{self.origin.url}/repository"

    @property
    def agent(self) -> AgentProcess:
        """The one that runs."""
        return self.agents[-1]

    def start(self, *, traced: bool = True, prefix: Sequence[str] = (), **fields: object) -> None:
        """A new agent process on the same disk, run by a tracer or by what stands in `prefix`."""
        number = len(self.agents)
        trace = self.home / f"trace-{number}"
        fields = {"host_socket": str(self.host.path), **fields}
        prefix = record_prefix(trace) if traced else prefix
        self.agents.append(AgentProcess(self.home, self.repository, number, prefix=prefix, **fields))
        self.traces += [trace] if traced else []

    def push(self, **fields: Any) -> int:
        """Publish the next release; returns its number."""
        self.release += 1
        self.publisher.push(self.release, **{"scale": 1.0 + self.release, "padding": PADDING_BYTES, **fields})
        return self.release

    def push_weights(self, seed: int, *, padding: int = 0) -> File:
        """Publish a release whose model has weights that a codec can work on; returns that file."""
        self.release += 1
        extra = {"notes.txt": random.Random(seed).randbytes(padding // 2).hex().encode()} if padding else {}
        model = model_with(weights(seed))
        return self.publisher.push_model(self.release, model, golden=GOLDEN, extra=extra).file("model.onnx")

    def update(self) -> int:
        """Push a good release to everybody and wait until it is committed."""
        release = self.push()
        self.publisher.roll(release)
        self.agent.rests(release)
        return release

    def recording(self) -> Recording:
        """What the agents did."""
        folder = self.home / "disk"
        calls = [call for trace in self.traces for call in read_trace(trace, folder)]
        manifests = {release: pick.manifest_sha256 for release, pick in self.publisher.picks.items()}
        repository = self.publisher.repository
        return Recording(
            folder, repository.folder, repository.serial, self.publisher.root, calls, manifests, self.release
        )


@contextmanager
def stage(home: Path) -> Iterator[Stage]:
    """A stage in a new folder; what runs on it ends with it."""
    for name in ("disk", "identity"):
        (home / name).mkdir(parents=True)
    publisher = Publisher(home / "home")
    (home / "identity" / "root.json").write_bytes(publisher.root)
    host = ScriptedHost(home / "host")
    with serving(publisher) as origin:
        made = Stage(home, origin, host)
        try:
            yield made
        finally:
            for agent in made.agents:
                if agent.process.poll() is None:
                    agent.process.kill()
                    agent.process.wait(WAIT_S)
            host.close()


def live(stage: Stage, *, rounds: int) -> Recording:
    """The whole life: `rounds` times everything that a release can go through."""
    stage.push(padding=0)
    stage.publisher.roll(stage.release)
    stage.start()
    stage.agent.rests(1)
    good = 1
    for turn in range(rounds):
        good = _one_round(stage, good, turn)
    return _end(stage)


def short_life(stage: Stage) -> Recording:
    """The least that touches every point: an installation, an update, a release that fails on probation."""
    stage.push(padding=0)
    stage.publisher.roll(stage.release)
    stage.start()
    stage.agent.rests(1)
    stage.update()
    good = stage.update()
    _fail(stage, good)
    return _end(stage)


def _end(stage: Stage) -> Recording:
    """The last update comes by a payload and by a large full file, both of several chunks."""
    before = stage.push_weights(7)
    stage.publisher.roll(stage.release)
    stage.agent.rests(stage.release)
    after = stage.push_weights(8, padding=LAST_PADDING_BYTES)
    publish_delta(stage.publisher, before, after)
    stage.publisher.roll(stage.release)
    stage.agent.rests(stage.release)
    stage.agent.end(signal.SIGTERM)
    return stage.recording()


def _fail(stage: Stage, good: int) -> None:
    bad = stage.push()
    stage.host.bad.add(bad)
    stage.publisher.roll(bad)
    stage.agent.until("it returns from a bad release", lambda model: bad in model.quarantined)
    stage.agent.rests(good)


def _one_round(stage: Stage, good: int, turn: int) -> int:
    good = stage.update()
    _fail(stage, good)
    broken = stage.push(expected=99.0)  # fails at the gate
    stage.publisher.roll(broken)
    stage.agent.until("the gate refuses it", lambda model: broken in model.quarantined)
    stage.agent.rests(good)
    _kill_in(stage, "FETCH" if turn % 2 else "PROBATION")
    candidate = stage.push()
    stage.publisher.roll(stage.release - 1, candidate=candidate, share=0.25, salt=f"salt-{turn}")
    stage.agent.rests(stage.release - 1, candidate=candidate)
    stage.publisher.roll(candidate)
    stage.agent.rests(candidate)
    stage.publisher.roll(candidate - 1, rollback=True)
    stage.agent.rests(candidate - 1)
    return candidate - 1


def _kill_in(stage: Stage, state: str) -> None:
    """The agent dies of a SIGKILL in this state; its successor finishes."""
    release = stage.push()
    if state == "PROBATION":
        stage.agent.end(signal.SIGTERM)
        stage.start(probation_s=20.0)
    stage.publisher.roll(release)
    stage.agent.until(f"it is in {state}", lambda model: model.state == state)
    stage.agent.end(signal.SIGKILL)
    stage.start()
    stage.agent.rests(release)
