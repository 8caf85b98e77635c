"""What every scene of the demo plays on: the running mesh, the operator's commands, and the list of checks."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from rich.console import Console

    from nearcast.cli.demo.traffic import Traffic
    from nearcast.cli.processes import Mesh

COMMAND_TIMEOUT_S = 60.0
POLL_S = 0.05
HTTP_TIMEOUT_S = 2.0
USABLE = frozenset({"chosen", "feasible", "hot"})
OBSERVATIONS_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the demo and whether it held."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One answer as a client saw it."""

    model: str
    version: str
    client: str
    served_by: str
    latency_ms: float


@dataclass(slots=True)
class Stage:
    """The scenes' shared state. `folder` belongs to the demo: bundles, operator's home, node data."""

    console: Console
    mesh: Mesh
    folder: Path
    checks: list[Check] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)

    def title(self, number: int, text: str) -> None:
        """Begin a scene."""
        self.console.print(f"\n[bold cyan]{number}. {text}[/]", soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(f"   {text}", soft_wrap=True)

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        """Note and show whether a promise held; the demo goes on either way."""
        self.checks.append(Check(name, ok, detail))
        mark = "[green]✓[/]" if ok else "[bold red]✗[/]"
        self.console.print(f"   {mark} {name}" + (f" [dim]{detail}[/]" if detail else ""), soft_wrap=True)

    def note(self, seen: Observation) -> None:
        """Remember an answer for the table; the oldest are forgotten first."""
        self.observations.append(seen)
        del self.observations[:-OBSERVATIONS_MAX]

    def observe(self, traffic: Traffic) -> None:
        """Remember the answers of a whole traffic."""
        for sample in traffic.samples:
            if sample.answer is not None:
                answer = sample.answer
                self.note(
                    Observation(
                        model=answer.model,
                        version=answer.version,
                        client=sample.client,
                        served_by=answer.served_by,
                        latency_ms=sample.latency_ms,
                    )
                )

    def edge_addresses(self) -> list[str]:
        """Where the edge nodes answer gRPC."""
        return [places["grpc"] for name, places in self.mesh.addresses.items() if name.startswith("edge")]

    async def is_ready(self, name: str, model: str) -> bool:
        """Whether a node itself, and not only another one that it knows, could answer for a model now."""
        url = f"http://{self.mesh.addresses[name]['metrics']}/v2/nearcast/route?model={model}"

        def ask() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as response:
                    terms = json.load(response)["candidates"]
            except OSError:
                return False
            return any(term["target"] == name and term["verdict"] in USABLE for term in terms)

        return await asyncio.to_thread(ask)

    async def command(self, *arguments: str, quiet: bool = False) -> tuple[int, str, str]:
        """Run `nearcast ARGUMENTS` as the operator would; returns exit code, output and errors."""
        if not quiet:
            self.console.print(f"   [dim]$ nearcast {' '.join(self._shorten(a) for a in arguments)}[/]", soft_wrap=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nearcast",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "NEARCAST_HOME": str(self.mesh.operator_home)},
        )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return 1, "", f"no answer within {COMMAND_TIMEOUT_S:g} s"
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def operate(self, *arguments: str) -> str:
        """Like `command`, but a failure ends the demo.

        Raises:
            MeshError: INTERNAL with what the command wrote to stderr.
        """
        code, out, err = await self.command(*arguments)
        if code:
            raise MeshError(
                Code.INTERNAL, f"`nearcast {' '.join(arguments)}` ended with {code}: {err.strip() or out.strip()}"
            )
        return out

    async def listing(self, *arguments: str) -> Any:
        """The `--json` answer of a listing."""
        _, out, _ = await self.command(*arguments, "--json", quiet=True)
        return json.loads(out)

    async def until(self, condition: Callable[[], Awaitable[bool]], *, timeout_s: float, what: str) -> float:
        """Wait for a condition; returns the seconds it took.

        Raises:
            MeshError: DEADLINE, naming what never came.
        """
        began = time.monotonic()
        while not await condition():
            if time.monotonic() - began > timeout_s:
                raise MeshError(
                    Code.DEADLINE, f"{what} did not happen within {timeout_s:g} s; logs are in {self.mesh.logs}."
                )
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began

    def _shorten(self, argument: str) -> str:
        return argument.replace(str(self.folder), "demo")
