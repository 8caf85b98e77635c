"""What a client gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nearcast.errors import Code
from nearcast.handler import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        outputs: arrays by name; read-only where they view the message.
        served_by: name of the node that ran the model.
        tier: how far that node is for the node that was asked: local, peer or cloud; "" if it does not say.
        version: release that answered.
        latency_ms: from the call to the answer, hedges and retries included.
        queue_ms, compute_ms: what the serving node says it waited and computed.
    """

    outputs: Tensors
    served_by: str
    tier: str
    version: str
    latency_ms: float
    queue_ms: float = 0.0
    compute_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCounts:
    """What a client has seen so far; requests = answered + failures."""

    requests: int
    answered: int
    hedges: int
    retries: int
    failed: Mapping[Code, int] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        """Requests that ended with an error."""
        return sum(self.failed.values())
