"""The client for asyncio programs."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from nearcast.client.answer import Answer, ClientCounts
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Parameter, RequestContext, Tensors
from nearcast.identity import Identity
from nearcast.load import NodeReport, VersionReport
from nearcast.transport.grpc import make_channel
from nearcast.transport.remote import RemoteNode
from nearcast.wire.request import TensorRequest
from router.policy import Policy, PolicyConfig
from router.router import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Bounds of one client.

    Attributes:
        models_max: models whose targets are remembered.
        in_flight_max: requests at the same time; more are refused at once.
        probe_s: mean pause between two readiness probes of a node.
        probe_timeout_s: a probe that takes longer counts as unanswered.
        probes_slow_max: unanswered probes in a row after which a node counts as lost.
        slots: requests that one node is first believed to run at the same time.
    """

    models_max: int = 256
    in_flight_max: int = 10_000
    probe_s: float = 0.5
    probe_timeout_s: float = 1.0
    probes_slow_max: int = 3
    slots: int = 16


class AsyncClient:
    """Knows several nodes and uses the mesh's own routing policy on them: deadlines, hedges, retries.

    Nodes are learnt from their answers and from readiness probes. Lives on one event loop; connects at the first call.

    Args:
        targets: addresses of client listeners, `host:port`.
        transport: "ngh2" or "grpcio".
        ca: PEM file of the authority that certified the nodes; None = plain connections.
        identity: the certificate to show.
        policy: parameters of the routing policy.
        limits: bounds.
        seed: makes the choices between near ties repeatable.
        clock: its monotonic time must be the loop's.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        transport: Literal["ngh2", "grpcio"] = "ngh2",
        ca: Path | None = None,
        identity: Identity | None = None,
        policy: PolicyConfig | None = None,
        limits: ClientLimits | None = None,
        seed: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not targets:
            raise MeshError(Code.INVALID_REQUEST, "A client needs the address of at least one node.")
        self._limits = limits or ClientLimits()
        self._now = clock.monotonic
        self._policy = Policy(policy or PolicyConfig(), secrets.randbits(63) if seed is None else seed)
        self._router = Router(self._policy, node="client", forward=False, clock=clock)
        self._nodes: dict[str, RemoteNode] = {}
        for address in dict.fromkeys(targets):
            channel = make_channel(transport, address, identity=identity, ca=ca)
            self._nodes[address] = RemoteNode(channel, address)
            self._router.attach(address, self._nodes[address], "peer")
        self._models: OrderedDict[str, None] = OrderedDict()
        self._ready = dict.fromkeys(self._nodes, True)
        self._ids = itertools.count(1)
        self._prefix = secrets.token_hex(4)
        self._probes: list[asyncio.Task[None]] = []
        self._requests = self._answered = 0
        self._failed: dict[Code, int] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def counts(self) -> ClientCounts:
        """What happened so far."""
        return ClientCounts(
            requests=self._requests,
            answered=self._answered,
            hedges=self._router.statistics.hedges,
            retries=self._router.statistics.retries,
            failed=dict(self._failed),
        )

    @property
    def in_flight(self) -> dict[str, int]:
        """Attempts under way, by the address of the node that was asked."""
        return {target.name: target.own for target in self._policy.targets}

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_ms: float | None = 5000.0,
        sequence: str = "",
        priority: int = 0,
        idempotency_key: str = "",
        parameters: Mapping[str, Parameter] | None = None,
    ) -> Answer:
        """Ask a model.

        Args:
            model: its name.
            inputs: arrays by name; they must not change before the answer is there.
            version: release to use; "" = what the channel serves.
            outputs: names of the outputs wanted; empty = all.
            deadline_ms: after this the answer is worthless; None = no deadline.
            sequence: the calls of one sequence go to one node and are neither hedged nor repeated.
            priority: 0 = default, 1 = highest, larger is lower.
            idempotency_key: makes repeating the call harmless.
            parameters: more protocol parameters.

        Raises:
            MeshError: the refusal, or the error of the last node that was asked.
        """
        self._start()
        self._requests += 1
        started = self._now()
        try:
            if self._policy.outstanding >= self._limits.in_flight_max:
                raise MeshError(
                    Code.OVERLOADED, f"This client has {self._limits.in_flight_max} requests in flight; wait for some."
                )
            self._know(model)
            said = {**(parameters or {}), "sequence_id": sequence} if sequence else dict(parameters or {})
            name = f"{self._prefix}-{next(self._ids)}"
            request = TensorRequest(
                model=model, inputs=inputs, version=version, id=name, parameters=said, outputs=outputs
            )
            context = RequestContext(
                deadline=None if deadline_ms is None else started + deadline_ms / 1e3,
                priority=priority,
                idempotency_key=idempotency_key,
            )
            response = await self._router.infer(request, context)
            decoded = response.decode()
        except MeshError as error:
            self._failed[error.code] = self._failed.get(error.code, 0) + 1
            raise
        except asyncio.CancelledError:
            self._failed[Code.CANCELLED] = self._failed.get(Code.CANCELLED, 0) + 1
            raise
        self._answered += 1
        served = response.served
        return Answer(
            outputs=decoded,
            served_by=served.node,
            tier=served.tier,
            version=response.version or served.version,
            latency_ms=(self._now() - started) * 1e3,
            queue_ms=served.queue_us / 1e3,
            compute_ms=served.compute_us / 1e3,
        )

    async def metadata(self, model: str, version: str = "", *, timeout_s: float = 5.0) -> ModelMetadata:
        """Tensors and versions of a model, from the first node that answers.

        Raises:
            MeshError: of the last node, such as MODEL_NOT_FOUND.
        """
        failure = MeshError(Code.UNAVAILABLE, "No node can be reached; check the addresses.")
        for node in self._nodes.values():
            try:
                return await node.metadata(model, version, deadline=self._now() + timeout_s)
            except MeshError as error:
                failure = error
        raise failure

    async def close(self) -> None:
        """Close all connections; calls in flight fail."""
        self._closed = True
        for task in self._probes:
            task.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        self._probes.clear()
        await self._router.close()
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def _start(self) -> None:
        if self._closed:
            raise MeshError(Code.UNAVAILABLE, "This client is closed; make a new one.")
        if not self._probes:
            loop = asyncio.get_running_loop()
            self._probes = [loop.create_task(self._probe_forever(*item)) for item in self._nodes.items()]

    def _know(self, model: str) -> None:
        """Nodes do not tell clients what they hold: each is believed to hold every model until it says no."""
        if model in self._models:
            self._models.move_to_end(model)
            return
        self._models[model] = None
        if len(self._models) > self._limits.models_max:
            self._models.popitem(last=False)
        for address in self._nodes:
            self._report(address)

    def _report(self, address: str) -> None:
        load = next((t.load for t in self._policy.targets if t.name == address), 0.0)
        report = NodeReport(
            node=address,
            role="edge",
            slots=self._limits.slots,
            in_flight=round(load),
            draining=not self._ready[address],
            versions=tuple(VersionReport(model=model, version="") for model in self._models),
        )
        self._policy.on_report(self._now(), address, report)

    async def _probe_forever(self, address: str, node: RemoteNode) -> None:
        connecting, slow = True, 0
        while True:
            started = self._now()
            try:
                async with asyncio.timeout(2 * self._limits.probe_timeout_s):
                    self._ready[address] = await node.is_ready(deadline=started + self._limits.probe_timeout_s)
            except (MeshError, TimeoutError) as error:
                connecting = True
                # One slow answer is a busy node, not a lost one; a refused connection is.
                timed_out = isinstance(error, TimeoutError) or error.code is Code.DEADLINE
                slow = slow + 1 if timed_out else self._limits.probes_slow_max
                if slow >= self._limits.probes_slow_max:
                    slow = 0
                    self._policy.on_probe(self._now(), address, None)
            else:
                slow = 0
                now = self._now()
                self._policy.on_probe(now, address, now - started, connecting=connecting)
                connecting = False
                self._report(address)
            await asyncio.sleep(self._limits.probe_s * random.uniform(0.75, 1.25))
