"""The client for programs without an event loop, and for notebooks: the same client on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from nearcast.client.answer import Answer, ClientCounts
from nearcast.client.asynchronous import DEFAULT_ADDRESS, AsyncClient
from nearcast.client.limits import ClientLimits
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Tensors
from nearcast.identity import Identity
from nearcast.runtime import run_in_daemon
from router.policy import PolicyConfig

T = TypeVar("T")


class Client:
    """`AsyncClient` for any number of threads. Arguments as there; close it, or use it in a `with` statement.

    ```python
    client = Client("10.0.0.5:8001")
    answer = client.infer("digits", {"x": image}, deadline_ms=50)
    for answer in client.stream("detector", camera, latest=True, deadline_ms=15):
        show(answer.outputs["boxes"])
    ```

    A call blocks its thread and no other. So it works in a notebook, whose thread runs an event loop of its own; in a
    program of coroutines it would hold the loop up, and `AsyncClient` is the one to use.
    """

    def __init__(
        self,
        targets: str | Sequence[str] = DEFAULT_ADDRESS,
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

    def infer(self, model: str, inputs: Mapping[str, Any], **options: Any) -> Answer:
        """Ask a model; the options are those of `AsyncClient.infer`. Ctrl-C cancels the request.

        Raises:
            MeshError: the refusal, or the error of the last node that was asked.
        """
        return self._run(self._client.infer(model, inputs, **options))

    def stream(self, model: str, frames: Iterable[Tensors], **options: Any) -> Iterator[Answer]:
        """Ask a model again and again; the options are those of `AsyncClient.stream`.

        The frames are taken on threads of their own, so a camera may let them wait. Leaving the loop ends the stream.

        Raises:
            MeshError: of the frame that ends the stream.
        """
        answers = self._client.stream(model, _on_threads(frames), **options)

        async def take() -> Answer | None:
            return await anext(answers, None)

        try:
            while (answer := self._run(take())) is not None:
                yield answer
        finally:
            if not self._loop.is_closed():
                self._run(answers.aclose())

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Tensors and versions of a model.

        Raises:
            MeshError: of the last node, such as MODEL_NOT_FOUND.
        """
        return self._run(self._client.metadata(model, version))

    def close(self) -> None:
        """Close all connections; calls in flight fail. A second call does nothing."""
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
        if threading.current_thread() is self._thread:
            work.close()
            raise MeshError(
                Code.INVALID_REQUEST, "A blocking client cannot be used on its own thread; use AsyncClient."
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


async def _on_threads(frames: Iterable[Tensors]) -> AsyncIterator[Tensors]:
    """The frames; whoever makes them may block, and need not be asked to the end."""
    iterator = iter(frames)
    while (frame := await run_in_daemon(lambda: next(iterator, None), name="nearcast-frames")) is not None:
        yield frame


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
