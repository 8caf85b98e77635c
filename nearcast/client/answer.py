"""What a client gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nearcast.errors import Code
from nearcast.handler import InferResponse, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        outputs: arrays by name; read-only where they view the message.
        served_by: name of the node that ran the model.
        tier: how far that node is for the node that was asked: local, peer or cloud; "" if it does not say.
        version: release that answered.
        latency_ms: from the call to the answer, hedges and retries included.
        queue_ms, compute_ms: what the serving node says it waited and computed; 0 in a stream with `latest`.
        index: in a stream, which of the inputs this answers, from 0.
    """

    outputs: Tensors
    served_by: str
    tier: str
    version: str
    latency_ms: float
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCounts:
    """What a client has seen so far; requests = answered + failures, once none is under way.

    `passed_on` counts requests that went through the router because no leased target could take them, `leases` the
    leases that were given or renewed, `dropped` what streams of the newest left out, once they have ended.
    """

    requests: int
    answered: int
    hedges: int
    retries: int
    passed_on: int = 0
    dropped: int = 0
    leases: int = 0
    failed: Mapping[Code, int] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        """Requests that ended with an error."""
        return sum(self.failed.values())


def to_answer(response: InferResponse, latency_s: float, index: int = 0) -> Answer:
    """An answer from a node's response.

    Raises:
        MeshError: INTERNAL if its tensors cannot be read.
    """
    served = response.served
    return Answer(
        outputs=response.decode(),
        served_by=served.node,
        tier=served.tier,
        version=response.version or served.version,
        latency_ms=latency_s * 1e3,
        queue_ms=served.queue_us / 1e3,
        compute_ms=served.compute_us / 1e3,
        index=index,
    )
