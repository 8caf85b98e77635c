"""One real mesh for all end-to-end tests: its processes, its operator, and what the tests ask again and again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import numpy.typing as npt
import onnx
from prometheus_client.parser import text_string_to_metric_families

from model_sync.agent.status import AgentStatus, read_status
from model_sync.publisher.bundle import create_bundle, read_spec
from model_sync.publisher.control_client import connect
from model_sync.publisher.push import Pushed, push
from nearcast.cli.demo import file_types
from nearcast.cli.demo.bundles import write_sources
from nearcast.cli.demo.samples import FILES, load_digits
from nearcast.cli.demo.traffic import Answer, Traffic
from nearcast.cli.processes import Mesh, MeshConfig

WAIT_S = 60.0
POLL_S = 0.02
COMMAND_TIMEOUT_S = 60.0
EDGES = ("edge-1", "edge-2")
EDGE_MODELS = ("digits", "magika", "wake_word")
CONFIG = MeshConfig(edges=len(EDGES), first_ports=False, edge_settings=("agent.probation_s=0.3",))
"""Nodes are killed and started again here faster than a probation of 5 s: a healthy release must have passed before."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Said:
    """An HTTP answer of any status."""

    status: int
    headers: dict[str, str]
    body: Any


class Fleet:
    """The mesh on a thread with a loop of its own, so that each test may have its own. All methods block.

    Tests that run on a loop call them through `asyncio.to_thread`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundles = folder / "bundles"
        self._loop = asyncio.new_event_loop()
        # The children ask the kernel to end them with this thread, so it lives as long as they do.
        self._thread = threading.Thread(target=self._loop.run_forever, name="mesh")
        self._thread.start()
        self._newest, self._tried = 2, False
        self.mesh: Mesh

    def start(self) -> None:
        """Start all processes, publish the demo's first releases, wait until the nodes hold them."""
        self.mesh = self._run(Mesh.start(self.folder / "mesh", config=CONFIG))
        for name, spec in write_sources(self.folder / "sources").items():
            create_bundle(read_spec(spec), spec.parent, self.bundles / name)
        for name in ("digits-1", "magika-1", "wake-word-1"):
            self.push(self.bundles / name, channel="stable")
        self.push(self.bundles / "digits-large-1", channel="cloud")
        for node in EDGES:
            for model in EDGE_MODELS:
                self.until(lambda node=node, model=model: self.is_hot(node, model), f"{model} on {node}")
            self.until(lambda node=node: self.is_settled(node), f"the end of the probations on {node}")
        self.until(lambda: self.is_hot("cloud-1", "digits_large"), "digits_large on cloud-1")
        self.until_routed()

    def stop(self) -> None:
        """End all processes and the thread."""
        try:
            if hasattr(self, "mesh"):
                self._run(self.mesh.stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # Processes.

    def address(self, name: str, kind: str = "grpc") -> str:
        """Where a process listens."""
        return self.mesh.addresses[name][kind]

    @property
    def edges(self) -> list[str]:
        """The client listeners of both edge nodes."""
        return [self.address(name) for name in EDGES]

    def kill(self, name: str, number: int) -> None:
        """Send a signal."""
        self._loop.call_soon_threadsafe(self.mesh.kill, name, number)

    def restart(self, name: str, *, routed: bool = True) -> None:
        """Start a process again that has ended; wait until it holds its models and (`routed`) the others know it."""
        self._run(self.mesh.restart(name))
        if name in EDGES:
            for model in EDGE_MODELS:
                self.until(lambda model=model: self.is_hot(name, model), f"{model} on {name} after its restart")
            self.until(lambda: self.is_settled(name), f"the end of the probations on {name}")
            if routed:
                self.until_routed()

    def is_settled(self, name: str) -> bool:
        """Whether the agent of a node is there and has no release on trial."""
        agent = self.agent(name)
        settled = all(model.state == "IDLE" for model in agent.models.values())
        return settled and set(EDGE_MODELS) <= set(agent.models) and Path(f"/proc/{agent.pid}").exists()

    def until_ended(self, name: str, timeout_s: float) -> int:
        """Wait for the end of a process; returns its exit code."""
        process = self.mesh._processes[name]
        self.until(lambda: not process.running, f"the end of {name}", timeout_s=timeout_s)
        return process.child.returncode

    def until_routed(self) -> None:
        """Wait until the stand-alone router knows both edge nodes as places for every model."""
        try:
            self.until(lambda: all(set(EDGES) <= set(self.candidates("router-1", m)) for m in EDGE_MODELS), "routes")
        except AssertionError as error:
            terms = {
                m: [(t["target"], t["version"], t["verdict"]) for t in self.terms("router-1", m)] for m in EDGE_MODELS
            }
            raise AssertionError(f"{error}; the router sees {terms}") from None

    def terms(self, name: str, model: str) -> list[dict[str, Any]]:
        """How a router judges each target for a model now."""
        said = ask_http(f"http://{self.address(name, 'metrics')}/v2/nearcast/route?{urlencode({'model': model})}")
        return said.body.get("candidates", []) if said.status == 200 else []

    def candidates(self, name: str, model: str) -> dict[str, float]:
        """The nodes that a router could send a request to now, each with the load that the router sees on it."""
        terms = self.terms(name, model)
        return {term["target"]: term["load"] for term in terms if term["verdict"] in ("chosen", "feasible", "hot")}

    def is_hot(self, name: str, model: str) -> bool:
        """Whether a node itself, and not only another one that it knows, could answer for a model now."""
        return name in self.candidates(name, model)

    def counter(self, name: str, metric: str, **labels: str) -> float:
        """A counter of a process, summed over all labels that are not given."""
        said = ask_http(f"http://{self.address(name, 'metrics')}/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(said.body.decode())
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )

    def agent(self, name: str) -> AgentStatus:
        """What the agent of a node says about itself."""
        status = read_status(self.mesh.data_dir / name / "models")
        assert status is not None, f"the agent of {name} has written no status yet"
        return status

    # The operator.

    @property
    def operator(self) -> Path:
        """What NEARCAST_HOME must be."""
        return self.mesh.operator_home

    def push(self, bundle: Path, *, channel: str, share: float | None = None) -> Pushed:
        """Publish a bundle."""
        self._tried |= share is not None
        with connect(self.operator) as client:
            return push(bundle, client, self.operator / "operator", channel=channel, share=share)

    def make_release(self, base: str = "digits-2", *, padding: int = 0) -> tuple[Path, int]:
        """A bundle of digits with the next free release number and bytes of its own; (bundle, release).

        `padding` makes its model file larger by so many bytes.
        """
        release, self._newest = self._newest, self._newest + 1
        source = self.folder / "sources" / f"digits-r{release}"
        shutil.copytree(self.folder / "sources" / base, source)
        model = onnx.load(source / f"{base}.onnx")
        model.doc_string = f"release {release}" + "x" * padding
        onnx.save(model, source / f"{base}.onnx")
        spec = (source / "spec.toml").read_text()
        lines = [
            f"release = {release}" if line.startswith("release =") else
            f'semver = "{release}.0.0"' if line.startswith("semver =") else line
            for line in spec.splitlines()
        ]  # fmt: skip
        (source / "spec.toml").write_text("\n".join(lines) + "\n")
        bundle = self.bundles / f"digits-r{release}"
        create_bundle(read_spec(source / "spec.toml"), source, bundle)
        return bundle, release

    def roll_back(self, model: str = "digits", release: int = 1) -> int:
        """Make a release the stable one again and end any trial, through the control API; the repository's serial."""
        with connect(self.operator) as client:
            wish = {"channel": "stable", "model": model, "action": "rollback", "release": release}
            return client.call("POST", "/v1/rollouts", wish)["serial"]

    def end_trial(self) -> None:
        """Leave no candidate behind, whatever happened to the test that started it."""
        if self._tried:
            self._tried = False
            with connect(self.operator) as client:
                rollouts = client.call("GET", "/v1/channels/stable")["rollouts"]
            if any(rollout["model"] == "digits" and rollout.get("candidate") for rollout in rollouts):
                self.roll_back()
                self.until_candidate(None)

    def until_candidate(self, release: int | None, *nodes: str) -> None:
        """Wait until the pointers of these nodes (default: all of the channel) name this candidate, or none."""
        names = nodes or (*EDGES, "router-1")
        self.until(
            lambda: {self.candidate(name) for name in names} == {release}, f"candidate {release} on {', '.join(names)}"
        )

    def candidate(self, name: str) -> int | None:
        """The candidate of digits in a node's pointer as its agent reports it; -1 while a new agent reports nothing."""
        models = self.agent(name).models
        return models["digits"].candidate if "digits" in models else -1

    @property
    def repository(self) -> Path:
        """The folder that the sync process serves."""
        return self.operator / "sync" / "repository"

    def new_agent(self, name: str) -> None:
        """End the agent of a node; the node starts another one, which looks at the repository at once."""
        before = self.agent(name).pid
        os.kill(before, signal.SIGTERM)
        self.until(
            lambda: self.agent(name).pid != before and self.agent(name).checked_at > 0, "a new agent's first look"
        )

    # Waiting.

    def until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = WAIT_S) -> float:
        """Wait for a condition; returns the seconds it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s:g} s; logs: {self.mesh.logs}"
            time.sleep(POLL_S)
        return time.monotonic() - began

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def nearcast(*arguments: str, home: Path | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
    """Run the command line as a person would."""
    environ = {**os.environ, **({"NEARCAST_HOME": str(home)} if home else {})}
    return subprocess.run(
        [sys.executable, "-m", "nearcast", *arguments],
        capture_output=True, text=True, timeout=timeout_s, check=False, env=environ,
    )  # fmt: skip


def ask_http(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Said:
    """One HTTP exchange; refusals are answers too. A server that is away has the status 0."""
    request = Request(url, body, {"content-type": "application/json", **(headers or {})})
    try:
        with urlopen(request, timeout=5.0) as response:
            status, said, data = response.status, dict(response.headers), response.read()
    except HTTPError as error:
        status, said, data = error.code, dict(error.headers), error.read()
        error.close()
    except OSError as error:
        return Said(0, {}, {"error": str(error)})
    try:
        return Said(status, {name.lower(): value for name, value in said.items()}, json.loads(data) if data else {})
    except ValueError:
        return Said(status, {name.lower(): value for name, value in said.items()}, data)


def image(digit: int) -> npt.NDArray[np.float32]:
    """A handwritten digit, [1, 64], that no model has seen in training."""
    return load_digits().images[digit][None, :]


def image_json(digit: int) -> dict[str, Any]:
    """The same as the body of a REST request."""
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image(digit)[0].tolist()}]}


def page() -> npt.NDArray[np.int32]:
    """What magika reads of a web page."""
    return file_types.extract_features(FILES["a web page"][0])


def is_html(scores: npt.NDArray[Any]) -> bool:
    """Whether magika's scores say what that page is."""
    return file_types.Labels(file_types.model_folder()).name(scores.reshape(-1))[0] == "html"


__all__ = ["EDGES", "Answer", "Fleet", "Said", "Traffic", "ask_http", "image", "image_json", "nearcast", "page"]
