"""The router: an `InferenceHandler` in front of the local model host and of other nodes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, InferRequest, InferResponse, ModelMetadata, RequestContext
from nearcast.load import NodeReport, Tier, VersionReport
from nearcast.metrics import Registry
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Responder
from nearcast.transport.statistics import Statistics
from nearcast.wire.request import StandInRequest
from router.cascade import Cascade
from router.exchange import Exchange
from router.passage import Passage
from router.policy import Decision, Outcome, Policy, Reject, RequestFacts, Send, assign, sticky_key
from router.policy.events import ABANDONED
from router.policy.refuse import unknown_model
from router.request_limits import read_limit
from router.shadow import ShadowConfig, ShadowLimits, Shadows
from router.splits import NoSplits, SplitSource
from router.statistics import RouterCollector, RouterStatistics
from router.timers import Timers

_METADATA_TIMEOUT_S = 2.0


class Node(InferenceHandler, Protocol):
    """A target that can also be asked about its models: the local host, or `RemoteNode`."""

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        """Tensors and versions of a model."""
        ...


class LocalHost(Node, Protocol):
    """What the router needs of the model host in its own process."""

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        """Whether the model ("" = the host) answers requests now."""
        ...

    def report(self) -> NodeReport:
        """What the host says about itself now."""
        ...


class RouterLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of the router itself.

    Attributes:
        report_ms: how often the local host's report is read.
    """

    report_ms: float = 250.0


class Router:
    """Decides once per request, by `router.policy`, and carries the decision out.

    Args:
        policy: decides; one per router, driven only from this event loop.
        local: the model host of this process; None in a stand-alone router.
        splits: which versions answer by default.
        node: this node's name; also the name of the local target.
        clock: its monotonic time must be the loop's.
        registry: where the metrics appear; None = nowhere.
        forward: whether targets are mesh listeners that take our word for the version. The SDK talks to client
            listeners: there the request's own version counts, and a sequence is taken to keep state.
        limits: bounds.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        local: LocalHost | None = None,
        splits: SplitSource | None = None,
        node: str = "local",
        clock: Clock = SYSTEM_CLOCK,
        registry: Registry | None = None,
        forward: bool = True,
        limits: RouterLimits | None = None,
    ) -> None:
        self.policy = policy
        self.node = node
        self.now = clock.monotonic
        self.splits: SplitSource = splits or NoSplits()
        self.statistics = RouterStatistics()
        self._cascade = Cascade(policy, clock.monotonic, self._facts, self._carry_out, self.statistics.escalations)
        self.shadows: Shadows | None = None
        self._local = local
        self._forward = forward
        self._report_s = (limits or RouterLimits()).report_ms / 1e3
        self._nodes: dict[str, Node] = {}
        self.direct: dict[str, RemoteNode] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.timers = Timers()
        self._nonces = itertools.count(1)
        self._watch: asyncio.Task[None] | None = None
        self._draining = False
        self._collector = RouterCollector(self.statistics, policy, self.now)
        self._registry = registry
        if registry is not None:
            registry.register(self._collector)
        if local is not None:
            self._nodes[node] = local
            policy.add_target(self.now(), node, "local")

    async def start(self) -> None:
        """Read the local host's report, and keep reading it."""
        if self._local is not None and self._watch is None:
            self.observe_local()
            self._watch = asyncio.get_running_loop().create_task(self._watch_local())

    def shadow(self, configs: Sequence[ShadowConfig], limits: ShadowLimits | None = None) -> None:
        """Copy a share of the requests of some models from now on."""
        self.shadows = Shadows(
            configs,
            policy=self.policy,
            now=self.now,
            call=lambda send, request, context: self._call(send, request, context, named=True),
            counts=self.statistics.shadows,
            limits=limits,
        )

    async def close(self) -> None:
        """Stop reading reports. Requests in flight go on; targets belong to whoever attached them."""
        self._draining = True
        if self.shadows is not None:
            await self.shadows.close()
        self.timers.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        if self._registry is not None:
            self._registry.unregister(self._collector)
            self._registry = None

    def mark_draining(self) -> None:
        """Say `not ready` from now on; requests are still answered."""
        self._draining = True

    # Targets ---------------------------------------------------------------------------------------------------------

    def attach(self, name: str, node: Node, tier: Tier, domain: str = "") -> bool:
        """Offer requests to a node from now on. False = the policy knows too many targets."""
        if name == self.node and self._local is not None:
            return False
        if not self.policy.add_target(self.now(), name, tier, domain):
            return False
        self._nodes[name] = node
        self.direct.pop(name, None)
        if isinstance(node, RemoteNode):
            self.direct[name] = node
        return True

    def detach(self, name: str) -> None:
        """Send nothing more to a node; what is on its way goes on."""
        if self._nodes.get(name) is not self._local:
            self._nodes.pop(name, None)
            self.direct.pop(name, None)
            self.policy.remove_target(self.now(), name)

    def observe_local(self, model: str | None = None) -> None:
        """Look at the local host and its pointers now: after a refresh, so that nobody waits for the next look."""
        self.splits.refresh(model)
        if self._local is not None:
            self.policy.on_report(self.now(), self.node, self._local.report())

    # Requests --------------------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Answer one request: here, elsewhere, or not at all and at once.

        Raises:
            MeshError: the refusal, or the error of the last target.
        """
        if context.forwarded:
            return await self._infer_forwarded(request, context)
        now = self.now()
        facts = self._facts(now, request, context)
        decision = self._decide(now, facts)
        response = await self._carry_out(decision, facts, request, context)
        if response.served.escalate and self._forward:
            response = await self.escalate(response, request, context)
        if self.shadows is not None:
            self.shadows.offer(request, context, response)
        return response

    @property
    def passes(self) -> bool:
        """Whether `pass_on` takes calls over: where the answers of nodes go on as bytes."""
        return self._local is None and self._forward

    def pass_on(
        self, request: InferRequest, context: RequestContext, responder: Responder, counts: Statistics | None
    ) -> Passage | None:
        """As `infer`, without a coroutine: the responder is told of the end. None = `infer` must do it.

        Raises:
            MeshError: the refusal.
        """
        if self.shadows is not None and request.model in self.shadows.models:
            return None
        now = self.now()
        facts = self._facts(now, request, context)
        passage = Passage(self, request, context, facts, responder, counts, now)
        passage.go(now, self._decide(now, facts))
        return passage

    async def stream(
        self, requests: AsyncIterator[InferRequest], context: RequestContext
    ) -> AsyncIterator[InferResponse]:
        """Answer a stream of requests, in order; each is decided for itself, a sequence stays together."""
        async for request in requests:
            yield await self.infer(request, context)

    def explain(self, facts: RequestFacts, *, principal: str = "") -> tuple[RequestFacts, Decision]:
        """What would be decided for such a request now, with the terms of every candidate. Sends nothing.

        `facts.version` is what the client would name; the facts that come back hold what that stands for.
        """
        wanted, fallbacks = self._versions(facts.model, facts.version, facts.sequence, principal, "", facts.tenant)
        facts = msgspec.structs.replace(facts, version=wanted, pinned=bool(facts.version), fallbacks=fallbacks)
        return facts, self.policy.decide(self.now(), facts, explain=True)

    # The directory of models -----------------------------------------------------------------------------------------

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        """Tensors and versions of a model, asked of a node that holds it.

        Raises:
            MeshError: MODEL_NOT_FOUND, naming the models that exist; VERSION_MISMATCH.
        """
        known = self.policy.models
        if model not in known:
            raise self._unknown(model)
        wanted = self.splits.alias(model, version) or version if version not in known[model] else version
        wanted = wanted or self.splits.split(model).stable
        # Who loads a model knows its tensors too: a question that comes meanwhile is no reason to refuse.
        held = self.policy.holders
        names = held(model, wanted) or held(model) or held(model, loading=True)
        nodes = [self._nodes[name] for name in sorted(names, key=lambda n: n != self.node) if name in self._nodes]
        error = MeshError(Code.UNAVAILABLE, f"No node that holds {model!r} can be asked now; try again.")
        for node in nodes:
            try:
                async with asyncio.timeout(_METADATA_TIMEOUT_S):
                    found = await node.metadata(model, wanted)
            except MeshError as failure:
                error = failure
            except TimeoutError:
                continue
            else:
                return replace(found, versions=tuple(sorted(known[model], key=lambda v: (len(v), v))))
        raise error

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        """Whether some target answers for the model ("" = for anything).

        Raises:
            MeshError: MODEL_NOT_FOUND for an unknown model.
        """
        if not model:
            local_ready = self._local is not None and await self._local.is_ready()
            return not self._draining and (local_ready or any(map(self.policy.holders, self.policy.models)))
        if model not in self.policy.models:
            raise self._unknown(model)
        return bool(self.policy.holders(model, version))

    def catalogue(self) -> NodeReport:
        """Every version that any target holds, as one report: what RepositoryIndex lists. Never for other routers."""
        versions = tuple(
            VersionReport(
                model=model, version=version, residency="hot" if self.policy.holders(model, version) else "loading"
            )
            for model, held in sorted(self.policy.models.items())
            for version in held
        )
        return NodeReport(node=self.node, role="router", versions=versions)

    def report_self(self) -> NodeReport:
        """What this node says about itself to other routers: the local host's report, or that it holds nothing."""
        if self._local is not None:
            report = self._local.report()
            return replace(report, draining=True) if self._draining else report
        return NodeReport(node=self.node, role="router", draining=self._draining)

    # What a request on its way needs ---------------------------------------------------------------------------------

    def ask(
        self, send: Send, request: InferRequest, context: RequestContext, facts: RequestFacts
    ) -> Awaitable[InferResponse]:
        """One attempt.

        Raises:
            MeshError: the target has left, or what it answers.
        """
        return self._call(send, request, context, named=bool(facts.version))

    def escalate(
        self, response: InferResponse, request: InferRequest, context: RequestContext
    ) -> Awaitable[InferResponse]:
        """A better answer than an uncertain one, if there can be one."""
        return self._cascade.follow(response, request, context)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what is rare in a task, and keep it until it has ended."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Inside ----------------------------------------------------------------------------------------------------------

    def _decide(self, now: float, facts: RequestFacts) -> Send:
        decision = self.policy.decide(now, facts)
        if isinstance(decision, Reject):
            self.statistics.refuse(decision, facts.priority)
            raise MeshError(decision.code, decision.message, retry_after_ms=decision.retry_after_ms)
        if decision.missed:
            self.statistics.missed += 1
        self.statistics.decisions[decision.reason] += 1
        return decision

    def _carry_out(
        self, decision: Send, facts: RequestFacts, request: InferRequest, context: RequestContext
    ) -> Awaitable[InferResponse]:
        exchange = Exchange(
            self.policy,
            self.now,
            lambda send: self._call(send, request, context, named=bool(facts.version)),
            facts,
            context.deadline,
            self.statistics,
            self.timers,
        )
        return exchange.run(decision)

    def _facts(self, now: float, request: InferRequest, context: RequestContext) -> RequestFacts:
        parameters = request.parameters
        sequence, quality_min, price_max = "", 0.0, None
        if parameters:
            sequence = request.sequence_id
            quality_min = read_limit(parameters, "quality_min") or 0.0
            price_max = read_limit(parameters, "price_max")
        version, fallbacks = self._versions(
            request.model, request.version, sequence, context.principal, request.id, context.tenant
        )
        return RequestFacts(
            model=request.model,
            version=version,
            pinned=bool(request.version),
            fallbacks=fallbacks,
            size_bytes=request.size_bytes,
            remaining_s=None if context.deadline is None else max(0.0, context.deadline - now),
            stateful=bool(sequence) and not self._forward,
            priority=context.priority,
            sequence=sequence,
            tenant=context.tenant,
            quality_min=quality_min,
            price_max=price_max,
        )

    def _versions(
        self, model: str, version: str, sequence: str, principal: str, request_id: str, tenant: str
    ) -> tuple[str, tuple[str, ...]]:
        """The version that should answer, and those that may instead. Assign first, then eligibility."""
        if not self._forward:
            return "", ()
        if version:
            known = self.policy.models.get(model, ()) if not version.isdecimal() else (version,)
            return (version if version in known else self.splits.alias(model, version) or version), ()
        split = self.splits.split(model)
        if split.candidate and split.share > 0.0:
            key = sticky_key(
                sequence=sequence,
                principal=principal,
                request_id=request_id,
                nonce=f"{self.node}.{next(self._nonces)}" if not (sequence or principal or request_id) else "",
            )
            if assign(split.salt, tenant, key, split.share):
                return split.candidate, tuple(v for v in (split.stable, split.last_good) if v)
        if split.last_good and split.last_good != split.stable:
            return split.stable, (split.last_good,)
        return split.stable, ()

    def _call(
        self, send: Send, request: InferRequest, context: RequestContext, *, named: bool
    ) -> Awaitable[InferResponse]:
        """One attempt. Where no pointer has `named` a version, the node's own pointer does: a trial never leaks."""
        node = self._nodes.get(send.target)
        if node is None:
            raise MeshError(Code.UNAVAILABLE, "The target has just left the mesh; try again.", sent=False)
        if send.model:
            request = StandInRequest(request, send.model)
        if self._forward:
            context = RequestContext(
                deadline=context.deadline,
                priority=context.priority,
                tenant=context.tenant,
                principal=context.principal,
                idempotency_key=context.idempotency_key,
                trace=context.trace,
                forwarded=node is not self._local,
                version=send.version if named else "",
            )
        return node.infer(request, context)

    async def _infer_forwarded(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Another router has decided: serve here or say `elsewhere`. Counted, so that our view of the host is exact."""
        if self._local is None:
            raise MeshError(Code.MODEL_NOT_FOUND, "This node holds no models; choose another one.")
        facts = RequestFacts(model=request.model, version=context.version, size_bytes=request.size_bytes)
        attempt = self.policy.on_sent(self.now(), facts, Send(self.node, context.version), "forwarded")
        self.statistics.forwarded += 1
        outcome = ABANDONED
        try:
            response = await self._local.infer(request, context)
            outcome = Outcome(served=response.served)
        except MeshError as error:
            outcome = Outcome(error.code, error.sent, error.retry_after_ms)
            raise
        except asyncio.CancelledError:
            raise
        except Exception:
            outcome = Outcome(Code.INTERNAL)
            raise
        finally:
            self.policy.on_reply(self.now(), attempt, outcome)
        return response

    async def _watch_local(self) -> None:
        assert self._local is not None
        while True:
            await asyncio.sleep(self._report_s)
            self.policy.on_report(self.now(), self.node, self._local.report())

    def _unknown(self, model: str) -> MeshError:
        reject = unknown_model(model, self.policy.models)
        return MeshError(reject.code, reject.message)
