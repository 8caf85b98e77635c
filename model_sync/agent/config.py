"""What the sync agent of a node is told: whom it asks, where it writes, and the bounds of everything it waits for."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from model_sync.replica.state import DeltaFailurePolicy
from model_sync.rollout.transitions import MODELS_MAX
from nearcast.store.pointer import Share

MIRRORS_MAX = 16
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class AgentLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of one agent.

    Attributes:
        quota_bytes: what the store may occupy, staging and partial downloads included.
        free_bytes_min: what must stay free on the file system after an installation.
        connect_timeout_s, chunk_timeout_s: for a connection, and for each 256 KiB chunk or metadata file.
        source_bytes_per_s_min: a source slower than this is left for another one, if there is another; 0 = never.
        download_bytes_per_s_max, download_bytes_per_day_max: what the whole agent may download; 0 = unlimited.
        upload_bytes_per_s_max: what it may give to other nodes; 0 = unlimited.
        check_s … activate_s: deadline of each state of an installation.
        backoff_base_s, backoff_cap_s: retry after attempt n waits uniformly in [0, min(cap, base * 2**n)].
        boots_max: starts of the agent during one probation before it is judged as failed.
        error_share_max, errors_min: probation fails from this share of errors on, and this many new errors.
        p99_factor_max, p99_slack_us, answers_min: it fails if p99 is more than that factor and more than that time
            above the p99 of the version before, both with so many answers.
        disagreement_share_max, compared_min: it fails if more than this share of the shadowed inputs, and of so many,
            is answered otherwise than by the version before. 1 = only the signed bound of the rollout counts.
        probation_requests: it passes early after so many requests without a fault.
        journal_bytes_max: the journal is compacted beyond this size.
        answer_bytes_max: longest answer accepted from the control API and from the host socket.
        models_max: models of the channel; a document that names more is refused.
    """

    quota_bytes: Annotated[int, msgspec.Meta(gt=0)] = 8 * 1024**3
    free_bytes_min: Annotated[int, msgspec.Meta(ge=0)] = 16 * 1024**2
    connect_timeout_s: Seconds = 5.0
    chunk_timeout_s: Seconds = 30.0
    source_bytes_per_s_min: Annotated[float, msgspec.Meta(ge=0)] = 32 * 1024
    download_bytes_per_s_max: Annotated[float, msgspec.Meta(ge=0)] = 0
    download_bytes_per_day_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    upload_bytes_per_s_max: Annotated[float, msgspec.Meta(ge=0)] = 0
    check_s: Seconds = 60.0
    plan_s: Seconds = 30.0
    fetch_s: Seconds = 3600.0
    patch_s: Seconds = 300.0
    verify_s: Seconds = 300.0
    stage_s: Seconds = 300.0
    gate_s: Seconds = 120.0
    activate_s: Seconds = 60.0
    backoff_base_s: Seconds = 1.0
    backoff_cap_s: Seconds = 300.0
    boots_max: Annotated[int, msgspec.Meta(ge=1)] = 2
    error_share_max: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    errors_min: Annotated[int, msgspec.Meta(ge=1)] = 5
    p99_factor_max: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    p99_slack_us: Annotated[float, msgspec.Meta(ge=0)] = 10_000.0
    answers_min: Annotated[int, msgspec.Meta(ge=1)] = 200
    disagreement_share_max: Share = 1.0
    compared_min: Annotated[int, msgspec.Meta(ge=1)] = 50
    probation_requests: Annotated[int, msgspec.Meta(ge=1)] = 1_000
    journal_bytes_max: Annotated[int, msgspec.Meta(ge=4096)] = 256 * 1024
    answer_bytes_max: Annotated[int, msgspec.Meta(ge=4096)] = 1024 * 1024
    models_max: Annotated[int, msgspec.Meta(ge=1)] = MODELS_MAX


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One agent.

    Attributes:
        node, role: whose agent this is; also the seed of the waves.
        control: URL of the sync process; "" = none: no hint, only polls of `repository`.
        repository: URL of the static repository, a folder, or s3://bucket/prefix; "" = `{control}/repository`.
        mirrors: further places of the same repository, asked when the ones before are down, slow or wrong.
        identity: folder with node.pem, node.key, ca.pem (needed for https) and root.json (the pinned TUF root).
        store: root of the store that the model host reads.
        host_socket: control socket of the model host; "" = no host to tell.
        channel: which channel document to follow.
        mode: `install` models, or only `follow` the channel with pointer files (a stand-alone router).
        poll_s: mean seconds between checks; each wait is drawn from [0, 2 * poll_s).
        apply_spread_s: a new stable version is taken over within this time, each node at its own moment; 0 = at once.
        on_delta_failure: what follows a delta that fails: the `full` file, the same again, or nothing.
        metered: the link is paid for by the byte: a delta that fails is never followed by the full file.
        tenant_keys: folder with the keys of tenants whose versions are sealed; "" = none.
        hint_wait_s: long-poll time asked of the control API.
        report_s: mean seconds between reports to the control API; trial_report_s: while a version is on trial.
        probation_s: how long a new version is watched before it is committed.
        peer_listen: host:port where this node gives chunks to others, over mTLS; it takes them from others, too. Port 0
            lets the system choose; "" = neither.
        build_time: seconds since 1970 before which no clock is believed; 0 = that of this release.
    """

    node: str = "edge-1"
    role: Literal["edge", "cloud", "router"] = "edge"
    control: str = ""
    repository: str = ""
    mirrors: Annotated[tuple[str, ...], msgspec.Meta(max_length=MIRRORS_MAX)] = ()
    identity: str = ""
    store: str = "models"
    host_socket: str = ""
    channel: str = "stable"
    mode: Literal["install", "follow"] = "install"
    poll_s: Seconds = 30.0
    apply_spread_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    on_delta_failure: DeltaFailurePolicy = "full"
    metered: bool = False
    tenant_keys: str = ""
    hint_wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 25.0
    report_s: Seconds = 60.0
    trial_report_s: Seconds = 10.0
    probation_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    peer_listen: str = ""
    build_time: Annotated[int, msgspec.Meta(ge=0)] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: AgentLimits = AgentLimits()

    @property
    def repository_url(self) -> str:
        """Where metadata, targets and blobs are, without a trailing slash."""
        return (self.repository or f"{self.control.rstrip('/')}/repository").rstrip("/")
