"""What an examination finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from nearcast.runtime import ExitCode
from nearcast.transport.mqtt.tls import TlsFiles

Check: TypeAlias = Literal[
    "broker", "certificates", "mqtt5", "nagle-here", "nagle-broker", "acl", "persistence", "node", "clock"
]
Status: TypeAlias = Literal["ok", "warn", "fail", "skip"]
"""`warn`: it works, with less than is promised, or it cannot be seen from here. `skip`: another line says why."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report. `advice` says what to do; "" = nothing."""

    check: Check
    status: Status
    detail: str
    advice: str = ""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is examined.

    Attributes:
        host, port: the broker.
        tenant, device: whom we play on the device's side; its name is made up unless a certificate names it.
        node: whose presence and answers count.
        device_tls, node_tls: who we are to the broker on either side; None = in the clear. Without files of the node
            only a running node can be on the other side.
        broker_config: the broker's `mosquitto.conf`, where it lies on this machine; None = elsewhere.
        data_dir: of the node, with its certificates and its clock floor; need not exist.
    """

    host: str
    port: int
    tenant: str = "local"
    device: str
    node: str
    device_tls: TlsFiles | None = None
    node_tls: TlsFiles | None = None
    broker_config: Path | None = None
    data_dir: Path

    @property
    def plays_node(self) -> bool:
        """Whether we can take the node's side too: nobody asks who we are, or we have the node's certificate."""
        return self.device_tls is None or self.node_tls is not None


class DoctorLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of an examination, which takes about as long as the broker's autosave interval.

    Attributes:
        answer_timeout_s: for each single answer.
        silence_s: what has not been delivered after this is not delivered.
        rounds: measurements of each kind; warm_up_rounds: messages before them, until the kernel no longer
            acknowledges every segment at once.
        stall_ms: beyond the plain round trip this is Nagle's, who waits for a delayed acknowledgement of 40 ms.
        autosave_margin_s: how late a broker may be with what it saves every so often.
        autosave_max_s: a longer interval is not waited for.
        expires_soon: share of a certificate's life; less than this left is worth a warning.
        session_expiry_s: of the session that is left behind if the examination is cut short.
    """

    answer_timeout_s: float = 5.0
    silence_s: float = 2.0
    rounds: int = 9
    warm_up_rounds: int = 20
    stall_ms: float = 20.0
    autosave_margin_s: float = 2.0
    autosave_max_s: float = 30.0
    expires_soon: float = 0.2
    session_expiry_s: int = 120


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """The exit code of a report: 0, 69 if there is no broker, else 1 if a check said no."""
    failed = {finding.check for finding in findings if finding.status == "fail"}
    if "broker" in failed:
        return ExitCode.UNAVAILABLE
    return ExitCode.FAILED if failed else ExitCode.OK
