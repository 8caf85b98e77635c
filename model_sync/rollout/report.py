"""What a node's agent tells the controller: signed by the node's own key, believed about that node only.

A report changes nothing on the node, delivered or not. Counters grow while a model host lives; `epoch` changes when
they began anew, so that the controller adds up differences and never counts twice.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from nearcast.store.manifest import ModelName, Release

REPORT_SIZE_BYTES_MAX = 256 * 1024
MODELS_MAX = 256
SIGNATURE_HEADER = "Nc-Signature"
"""ECDSA signature over the bytes of the body, by the key of the node's certificate, in base64."""
FOLLOWING = "FOLLOW"
"""State of a model on a node that holds none, such as a stand-alone router: it obeys the channel and tries nothing."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=512)]


class ReleaseReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One release of one model on one node.

    Attributes:
        errors: requests that the model itself failed.
        latency: requests by bucket of their duration, as in `nearcast.serving.statistics`; only buckets that are used.
        compared, disagreed: shadowed inputs on which the candidate was compared with stable, and those that differed
            by more than the golden tolerance.
    """

    release: Release
    requests: Count = 0
    errors: Count = 0
    latency: Annotated[dict[str, Count], msgspec.Meta(max_length=256)] = {}
    compared: Count = 0
    disagreed: Count = 0


def counted_since(before: ReleaseReport | None, now: ReleaseReport) -> ReleaseReport:
    """What was counted between two reports of one epoch; never negative, never more bad than there was at all."""
    if before is None:
        before = ReleaseReport(release=now.release)
    requests = max(0, now.requests - before.requests)
    compared = max(0, now.compared - before.compared)
    latency = {key: count - before.latency.get(key, 0) for key, count in now.latency.items()}
    return ReleaseReport(
        release=now.release,
        requests=requests,
        errors=min(requests, max(0, now.errors - before.errors)),
        latency={key: count for key, count in latency.items() if count > 0},
        compared=compared,
        disagreed=min(compared, max(0, now.disagreed - before.disagreed)),
    )


class ModelReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model: where its replica machine is, what the pointer says, why not further (`error`), and the counters.

    `reasons`: why each quarantined release is, by release in decimal.
    """

    model: ModelName
    state: Annotated[str, msgspec.Meta(max_length=16)]
    stable: Release | None = None
    candidate: Release | None = None
    last_good: Release | None = None
    goal: Release | None = None
    intent: Count = 0
    error: Text = ""
    quarantined: Annotated[tuple[Release, ...], msgspec.Meta(max_length=64)] = ()
    reasons: Annotated[dict[str, Text], msgspec.Meta(max_length=64)] = {}
    received_bytes: Count = 0
    releases: Annotated[tuple[ReleaseReport, ...], msgspec.Meta(max_length=16)] = ()


class SyncReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node. `sequence` grows with each report of one `epoch`; an older one is ignored (replays)."""

    schema: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    node: Annotated[str, msgspec.Meta(max_length=64)]
    channel: ModelName
    epoch: Annotated[str, msgspec.Meta(max_length=32)]
    sequence: Count
    at: Annotated[float, msgspec.Meta(ge=0)]
    serial: Count = 0
    clock_ok: bool = True
    error: Text = ""
    models: Annotated[tuple[ModelReport, ...], msgspec.Meta(max_length=MODELS_MAX)] = ()
