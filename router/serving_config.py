"""What a node that holds models is told."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nearcast.serving.limits import SLOTS, HostLimits
from nearcast.telemetry import TelemetryConfig
from router.config import ProbeConfig
from router.decision_log import DecisionLogConfig
from router.lease import LeaseConfig
from router.policy import PolicyConfig
from router.shadow import ShadowConfig, ShadowLimits
from router.traces import TracesConfig


class ListenConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a node listens. Port 0 = the system chooses.

    Attributes:
        grpc, http: for clients; other addresses than loopback need `tls`.
        local: gRPC for clients of this machine beside `grpc`, as `unix:/path`; "" = nowhere. They may use shared
            memory, and load and unload models if they run as the node's user.
        metrics: Prometheus; "" = nowhere.
        mesh: for other nodes, always with client certificates; opened only by a node with an identity.
        tls: show the node's mesh certificate to clients too.
        transport: which implementation of gRPC.
    """

    grpc: str = "127.0.0.1:8001"
    http: str = "127.0.0.1:8000"
    local: Annotated[str, msgspec.Meta(pattern=r"^(unix:/.+)?\Z")] = ""
    metrics: str = "127.0.0.1:8002"
    mesh: str = "127.0.0.1:0"
    tls: bool = False
    transport: Literal["ngh2", "grpcio"] = "ngh2"


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sync agent that a node with an identity runs beside itself.

    Attributes:
        channel: which channel document it follows.
        poll_s: mean seconds between looks at the repository, where no hint comes.
        probation_s: how long a new version is watched before it is committed.
        repository: where it is read: http(s)://, s3://bucket/prefix or a folder; "" = the controller's repository.
        mirrors: further places of the same repository, asked when the ones before are down, slow or wrong.
        quota_bytes: what the models of this node may occupy, downloads under way included.
        download_bytes_per_s_max, download_bytes_per_day_max: what may be downloaded; 0 = unlimited.
        on_delta_failure: what follows a delta that fails: the `full` file, the same again, or nothing.
        metered: the link is paid for by the byte: a delta that fails is never followed by the full file.
        apply_spread_s: a new stable version is taken over within this time, each node at its own moment.
        peer_listen: host:port where the agent gives chunks of models to other nodes; "" = it neither gives nor takes.
        upload_bytes_per_s_max: what it may give; 0 = unlimited.
    """

    enabled: bool = True
    channel: str = "stable"
    poll_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    probation_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    repository: str = ""
    mirrors: tuple[str, ...] = ()
    quota_bytes: Annotated[int, msgspec.Meta(gt=0)] = 8 * 1024**3
    download_bytes_per_s_max: Annotated[float, msgspec.Meta(ge=0)] = 0
    download_bytes_per_day_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    on_delta_failure: Literal["full", "retry", "fail"] = "full"
    metered: bool = False
    apply_spread_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    peer_listen: str = ""
    upload_bytes_per_s_max: Annotated[float, msgspec.Meta(ge=0)] = 0


class MemorySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What models may take of this node's memory; what does not fit is loaded when a request asks for it.

    Attributes:
        bytes_max: of all versions in memory together, by estimate.
        protect_s: how long a version that came in for a request may stay.
        pinned: models that are never sent away.
    """

    bytes_max: Annotated[int, msgspec.Meta(gt=0)] = 1024**3
    protect_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    pinned: tuple[str, ...] = ()


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How this node runs models.

    Attributes:
        slots: runs in threads at the same time, over all models; 0 = one for each processor.
        threads: of one run, where no profile of the version advises others.
        batch_rows_max: rows of one run, whatever a profile advises.
        queue_rows_max: rows that may wait for one version.
        late_quantile: what would have to wait and be late at this quantile of the run times is refused at once, and
            what need not wait if it would be late at their median; 0 = it is run.
        cache_bytes_max: answers that are remembered, of models whose manifest allows it.
        real_time: the loop that listens and answers goes before everything ordinary on this machine while it uses
            little of a core, where the system grants that (CAP_SYS_NICE, or LimitRTPRIO of its systemd unit).
        tune: measure versions without a profile beside the serving, and run them as that advises.
    """

    slots: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    queue_rows_max: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 256
    late_quantile: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.95
    cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    real_time: bool = True
    tune: bool = False


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node that holds models.

    Attributes:
        name: this node's name where it has no identity; with one, the certificate's name counts.
        data_dir: identity, models, control socket, inbox, logs of children.
        price: of 1000 answers of this node, in the operator's unit; routers weigh it.
        tenant_keys: folder with the keys of tenants whose versions are sealed; "" = none.
        seed: of the router's choices between near ties; 0 = a different one at each start.
        decisions: whether the router's are logged, so that `nearcast route replay` can make them again.
        shadows: versions or models that get copies of a share of the requests; `shadow` bounds them all.
        drain_s: how long requests may take to finish at the end; on an edge node again as long for devices.
    """

    name: str = "node"
    data_dir: str = ".nearcast/node"
    price: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    tenant_keys: str = ""
    listen: ListenConfig = ListenConfig()
    agent: AgentSettings = AgentSettings()
    memory: MemorySettings = MemorySettings()
    run: RunSettings = RunSettings()
    policy: PolicyConfig = PolicyConfig()
    probe: ProbeConfig = ProbeConfig()
    lease: LeaseConfig = LeaseConfig()
    shadows: tuple[ShadowConfig, ...] = ()
    shadow: ShadowLimits = ShadowLimits()
    telemetry: TelemetryConfig = TelemetryConfig()
    traces: TracesConfig = TracesConfig()
    seed: int = 0
    decisions: DecisionLogConfig = DecisionLogConfig()
    drain_s: Annotated[float, msgspec.Meta(gt=0)] = 2.5

    def host_limits(self) -> HostLimits:
        """The bounds of the node's model host."""
        memory, run = self.memory, self.run
        return HostLimits(
            memory_bytes_max=memory.bytes_max,
            memory_protect_s=memory.protect_s,
            pinned=frozenset(memory.pinned),
            slots=run.slots or SLOTS,
            threads=run.threads,
            batch_rows_max=run.batch_rows_max,
            queue_rows_max=run.queue_rows_max,
            late_quantile=run.late_quantile,
            cache_bytes_max=run.cache_bytes_max,
            real_time=run.real_time,
            tune=run.tune,
        )
