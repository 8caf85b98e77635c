"""What a stand-alone router is told."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nearcast.telemetry import TelemetryConfig
from router.decision_log import DecisionLogConfig
from router.lease import LeaseConfig
from router.policy import PolicyConfig
from router.router import RouterLimits
from router.shadow import ShadowConfig, ShadowLimits
from router.traces import TracesConfig

Positive = Annotated[float, msgspec.Meta(gt=0)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]


class TargetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node that is known without a directory.

    Attributes:
        name: what it is called here; a node of the mesh must have this name in its certificate.
        address: `host:port` of its mesh listener; of an OIP server its gRPC listener.
        role: how far it is: an edge node or a cloud core.
        domain: targets of one domain fail together; "" = its own.
        kind: a node of the mesh, or any server of the Open Inference Protocol (MLServer, Triton, …).
        price: of 1000 answers, in the operator's unit; None = what the node says, 0 for an OIP server.
        quality: of its answers, in [0, 1]; None = what the node says, 1 for an OIP server.
        ca: PEM file of the authority that an OIP server's certificate is from; "" = no TLS.
        models: `name` or `name@version` that an OIP server holds; empty = what its RepositoryIndex lists.
        slots: model runs that an OIP server carries out at the same time.
    """

    name: Name
    address: str
    role: Literal["edge", "cloud"] = "edge"
    domain: str = ""
    kind: Literal["nearcast", "oip"] = "nearcast"
    price: Annotated[float, msgspec.Meta(ge=0)] | None = None
    quality: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    ca: str = ""
    models: tuple[str, ...] = ()
    slots: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.kind == "nearcast" and (self.ca or self.models or self.slots is not None):
            raise ValueError('ca, models and slots are for a target with kind = "oip"; a node says them itself')


class ProbeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How targets are watched.

    Attributes:
        directory_ms: mean time between looks at the node directory.
        announce_ms: time between words about ourselves to the directory.
        report_ms: time between reports of one target in which nothing changes, or between polls of one that has no
            stream of reports.
        reports_per_s_max: all targets together send reports of a changed load no more often.
        idle_ms: a target that has answered no request for so long is asked for the round trip, and again after it.
        timeout_ms: a probe that takes longer counts as unanswered.
        failures_max: unanswered probes in a row after which the connection is given up and made anew.
        connects_max: connections that are being made at the same time.
        drain_ms: how long a connection to a target that left may finish what is in flight.
    """

    directory_ms: Positive = 1000.0
    announce_ms: Positive = 5000.0
    report_ms: Positive = 350.0
    reports_per_s_max: Positive = 500.0
    idle_ms: Annotated[float, msgspec.Meta(ge=1000)] = 1000.0
    timeout_ms: Positive = 1000.0
    failures_max: Annotated[int, msgspec.Meta(ge=1)] = 3
    connects_max: Annotated[int, msgspec.Meta(ge=1)] = 32
    drain_ms: Positive = 5000.0


class ListenConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Addresses; port 0 = the system chooses; "" = do not listen. `mesh` needs an identity."""

    grpc: str = "127.0.0.1:8001"
    http: str = "127.0.0.1:8000"
    metrics: str = "127.0.0.1:8002"
    mesh: str = "127.0.0.1:0"


class AgentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The follow-mode agent beside the router: it writes pointer files only.

    Attributes:
        enabled: start one, if there is an identity and a control address.
        channel: which channel to follow.
        poll_s: mean seconds between its checks.
    """

    enabled: bool = True
    channel: str = "stable"
    poll_s: Positive = 30.0


class RouterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stand-alone router.

    Attributes:
        name: this router's name; an identity's name outranks it.
        data_dir: where the store of pointers, the identity and the agent's files lie.
        identity: folder of the identity; "" = `<data_dir>/identity` if that exists.
        control: URL of the control API; "" = what the identity's folder names.
        transport: of all gRPC listeners and channels.
        tls: serve the client listeners with the identity's certificate (needed beyond loopback).
        seed: of the policy; -1 = drawn at start.
        decisions: whether they are logged, so that `nearcast route replay` can make them again.
        shadows: versions or models that get copies of a share of the requests; `shadow` bounds them all.
    """

    name: Name = "router"
    data_dir: str = "router-data"
    identity: str = ""
    control: str = ""
    transport: Literal["ngh2", "grpcio"] = "ngh2"
    tls: bool = False
    seed: Annotated[int, msgspec.Meta(ge=-1)] = -1
    decisions: DecisionLogConfig = DecisionLogConfig()
    listen: ListenConfig = ListenConfig()
    targets: tuple[TargetConfig, ...] = ()
    probe: ProbeConfig = ProbeConfig()
    policy: PolicyConfig = PolicyConfig()
    agent: AgentSection = AgentSection()
    lease: LeaseConfig = LeaseConfig()
    limits: RouterLimits = RouterLimits()
    shadows: tuple[ShadowConfig, ...] = ()
    shadow: ShadowLimits = ShadowLimits()
    telemetry: TelemetryConfig = TelemetryConfig()
    traces: TracesConfig = TracesConfig()

    def __post_init__(self) -> None:
        names = [target.name for target in self.targets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)!r} is the name of two targets; each needs its own")
