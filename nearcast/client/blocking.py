"""The client for programs without an event loop: the same client on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from nearcast.client.answer import Answer, ClientCounts
from nearcast.client.asynchronous import AsyncClient, ClientLimits
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Tensors
from nearcast.identity import Identity
from router.policy import PolicyConfig

T = TypeVar("T")


class Client:
    """`AsyncClient` for any number of threads. Arguments as there; close it, or use it in a `with` statement."""

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
    ) -> None:
        # Made here, so that wrong arguments are told at once; it touches the loop only when it is used.
        self._client = AsyncClient(
            targets, transport=transport, ca=ca, identity=identity, policy=policy, limits=limits, seed=seed
        )
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nearcast-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def counts(self) -> ClientCounts:
        """What happened so far."""
        return self._client.counts

    def infer(self, model: str, inputs: Tensors, **options: Any) -> Answer:
        """Ask a model; the options are those of `AsyncClient.infer`.

        Raises:
            MeshError: the refusal, or the error of the last node that was asked.
        """
        return self._run(self._client.infer(model, inputs, **options))

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Tensors and versions of a model.

        Raises:
            MeshError: of the last node, such as MODEL_NOT_FOUND.
        """
        return self._run(self._client.metadata(model, version))

    def close(self) -> None:
        """Close all connections and end the thread. Closing twice is harmless."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise MeshError(Code.UNAVAILABLE, "This client is closed; make a new one.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
