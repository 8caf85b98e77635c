"""Telling the controller how this node is: signed, often while a version is on trial, and never a reason for anything.

A report that cannot be built, signed or delivered is dropped, and the next one says more; nothing waits for it.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import secrets
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model_sync.agent.config import AgentConfig
from model_sync.agent.host_link import HostLink, VersionState
from model_sync.agent.status import AgentStatus, ModelStatus
from model_sync.rollout.report import (
    MODELS_MAX,
    REPORT_SIZE_BYTES_MAX,
    SIGNATURE_HEADER,
    ModelReport,
    ReleaseReport,
    SyncReport,
)
from nearcast.errors import Code, MeshError
from nearcast.identity import require_role, tls_error
from nearcast.telemetry import get_logger

TIMEOUT_S = 10.0
HOST_TIMEOUT_S = 2.0
TEXT_MAX = 500
RELEASES_MAX = 16
_log = get_logger("model_sync.agent")

Counted: TypeAlias = Mapping[str, Mapping[int, VersionState]]
"""What the host has counted, by model and release."""


class ReportBuilder:
    """Numbers the reports of one agent. `epoch` changes whenever a counter fell, because the host began anew."""

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(8)
        self._sequence = 0
        self._requests: dict[tuple[str, int], int] = {}

    def build(self, status: AgentStatus, counted: Counted) -> bytes:
        """The next report as JSON, at most `REPORT_SIZE_BYTES_MAX` bytes: without histograms if it must."""
        requests = {
            (model, release): one.requests for model, found in counted.items() for release, one in found.items()
        }
        if any(requests.get(key, before) < before for key, before in self._requests.items()):
            self._epoch, self._sequence, self._requests = secrets.token_hex(8), 0, {}
        self._requests |= requests
        self._sequence += 1
        models = tuple(
            _model_report(model, one, counted.get(model, {}))
            for model, one in sorted(status.models.items())[:MODELS_MAX]
        )
        report = SyncReport(
            node=status.node,
            channel=status.channel,
            epoch=self._epoch,
            sequence=self._sequence,
            at=max(0.0, status.checked_at),
            serial=status.serial,
            clock_ok=status.clock_ok,
            error=status.error[:TEXT_MAX],
            models=models,
        )
        data = msgspec.json.encode(report)
        if len(data) > REPORT_SIZE_BYTES_MAX:
            plain = tuple(msgspec.structs.replace(one, releases=()) for one in models)
            data = msgspec.json.encode(msgspec.structs.replace(report, models=plain))
        return data


def _model_report(model: str, status: ModelStatus, counted: Mapping[int, VersionState]) -> ModelReport:
    releases = [
        ReleaseReport(
            release=release,
            requests=one.requests,
            errors=one.errors,
            latency=one.latency,
            compared=one.compared,
            disagreed=one.disagreed,
        )
        for release, one in sorted(counted.items())[-RELEASES_MAX:]
    ]
    return ModelReport(
        model=model,
        state=status.state,
        stable=status.stable,
        candidate=status.candidate,
        last_good=status.last_good,
        goal=status.goal,
        intent=status.intent,
        error=status.error[:TEXT_MAX],
        quarantined=status.quarantined[-64:],
        reasons={release: text[:TEXT_MAX] for release, text in list(status.reasons.items())[-64:]},
        received_bytes=status.received_bytes,
        releases=tuple(releases),
    )


def sign_report(data: bytes, key_file: Path) -> str:
    """The node's signature over exactly these bytes, in base64: ECDSA with the key of its certificate, SHA-256.

    Raises:
        MeshError: UNAUTHENTICATED if the key cannot be used.
    """
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise MeshError(Code.UNAUTHENTICATED, f"{key_file} is no readable private key; join again.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MeshError(Code.UNAUTHENTICATED, f"{key_file} is no EC key; join again.")
    return base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()


class Reporter:
    """Reports at jittered intervals for as long as the agent lives.

    Args:
        config: where to and how often.
        host: whose counters to report.
        status: what the agent says about itself now.
        tls: makes the context of a connection, with the node's certificate.
        key_file: the node's private key.
        draw: uniform numbers in [0, 1) for the jitter.
        failed: told the reason of each report that was not delivered.
    """

    def __init__(
        self,
        config: AgentConfig,
        host: HostLink,
        status: Callable[[], AgentStatus],
        tls: Callable[[], ssl.SSLContext],
        key_file: Path,
        *,
        draw: Callable[[], float],
        failed: Callable[[str], None],
    ) -> None:
        self._config = config
        self._host = host
        self._status = status
        self._tls = tls
        self._key_file = key_file
        self._draw = draw
        self._failed = failed
        self._builder = ReportBuilder()
        self._changed = asyncio.Event()
        self._seen: object = None
        self._reason = ""
        self._sender = ThreadPoolExecutor(1, "report")
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report."""
        self._task = asyncio.get_running_loop().create_task(self._report_forever())

    def look(self) -> None:
        """The agent changed something: if it is worth a word, say it soon."""
        state = {name: (one.stable, one.candidate, one.quarantined) for name, one in self._status().models.items()}
        if state != self._seen:
            self._seen = state
            self._changed.set()

    async def close(self) -> None:
        """Stop, and break a report that is on its way."""
        if self._task is not None:
            self._task.cancel()
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            with suppress(asyncio.CancelledError):
                await self._task
        self._sender.shutdown(wait=False, cancel_futures=True)

    async def report(self) -> None:
        """Send one report now.

        Raises:
            MeshError: if it was not delivered, and why.
        """
        status = self._status()
        data = self._builder.build(status, await self._count(status))
        await asyncio.get_running_loop().run_in_executor(self._sender, self._send, data)

    async def _report_forever(self) -> None:
        while True:
            await self._pause()
            try:
                await self.report()
            except MeshError as error:
                if error.message != self._reason:
                    _log.info("report_failed", error=error.message)
                self._reason = error.message
                self._failed(error.message)
            except Exception:  # noqa: BLE001 - a report is never worth more than a line in the log
                _log.exception("report_broke")
            else:
                self._reason = ""

    async def _pause(self) -> None:
        """Uniform in half to three halves of the interval; after a change, within one trial interval."""
        on_trial = any(one.candidate or one.goal for one in self._status().models.values())
        span = self._config.trial_report_s if on_trial else self._config.report_s
        loop = asyncio.get_running_loop()
        deadline = loop.time() + span * (0.5 + self._draw())
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
            self._changed.clear()
            soon = min(self._config.trial_report_s, span) * self._draw()
            await asyncio.sleep(max(0.0, min(deadline, loop.time() + soon) - loop.time()))

    async def _count(self, status: AgentStatus) -> Counted:
        counted = {}
        for model in status.models if self._host.present else ():
            with suppress(MeshError):  # a host that is away says nothing, and the rest is reported all the same
                counted[model] = await self._host.ask("stats", model, timeout_s=HOST_TIMEOUT_S)
        return counted

    def _send(self, data: bytes) -> None:
        parts = urlsplit(self._config.control)
        headers = {"Content-Type": "application/json", SIGNATURE_HEADER: sign_report(data, self._key_file)}
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=self._tls()
        )
        try:
            connection.connect()
            self._socket = connection.sock
            require_role(connection.sock.getpeercert(), ("sync",))
            connection.request("POST", "/v1/reports", data, headers)
            response = connection.getresponse()
            answer = response.read(4096)
        except (OSError, http.client.HTTPException) as error:
            raise tls_error(error, self._config.control) from error
        finally:
            self._socket = None
            connection.close()
        if response.status >= http.client.BAD_REQUEST:
            raise MeshError(
                Code.UNAVAILABLE, f"The controller refused the report ({response.status}): {answer[:200]!r}."
            )
