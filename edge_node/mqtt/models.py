"""What models take. It is asked seldom, and what was said last holds while nobody can be asked."""

from __future__ import annotations

import asyncio
from functools import partial
from math import inf
from typing import TypeAlias

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelDirectory, ModelMetadata

MODELS_MAX = 1024
"""Models whose tensors are remembered."""
AGE_S_MAX = 1.0
"""A model is asked about its tensors this often: for a small one the question costs as much as the answer."""
WAIT_S_MAX = 0.1
"""Who knows an older answer waits so long for a new one: a link may swallow the question, and then a smaller model
needs the time."""
ASK_S_MAX = 10.0
"""A question that nobody has answered by then counts as lost; the next one is asked anew."""
Key: TypeAlias = tuple[str, str]


class KnownModels:
    """The tensors of models by name and version.

    Args:
        directory: whom to ask.
        clock: monotonic.
    """

    def __init__(self, directory: ModelDirectory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._known: dict[Key, tuple[float, ModelMetadata]] = {}
        self._questions: dict[Key, asyncio.Task[ModelMetadata]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def forget(self, key: Key) -> None:
        """The model has gone for good."""
        self._known.pop(key, None)

    async def metadata(self, model: str, version: str = "", *, renew: bool = False) -> ModelMetadata:
        """The model's tensors, of the last second if they can be had; with `renew` as they are now, or not at all.

        Raises:
            MeshError: what the directory says; UNAVAILABLE only if the model was never known.
        """
        key, now = (model, version), self._clock.monotonic()
        asked_at, known = self._known.get(key, (-inf, None))
        if known is None or renew:
            return await self._ask(key, now)
        if key in self._questions or now - asked_at < AGE_S_MAX:
            return known
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                return await asyncio.shield(self._ask_beside(key, now))
        except TimeoutError:
            return known
        except MeshError as error:
            if error.code is not Code.UNAVAILABLE:
                raise
            return known

    async def close(self) -> None:
        """Wait for no answer any more."""
        for question in self._questions.values():
            question.cancel()
        await asyncio.gather(*self._questions.values(), return_exceptions=True)

    async def _ask(self, key: Key, now: float) -> ModelMetadata:
        try:
            async with asyncio.timeout(ASK_S_MAX):
                metadata = await self._directory.metadata(*key)
        except TimeoutError as error:
            reason = f"Nobody said within {ASK_S_MAX:g} s what the model '{key[0]}' takes; ask again later."
            raise MeshError(Code.UNAVAILABLE, reason) from error
        except MeshError as error:
            error.sent = False  # only a question was
            raise
        self._known[key] = now, metadata
        if len(self._known) > MODELS_MAX:
            del self._known[next(iter(self._known))]
        return metadata

    def _ask_beside(self, key: Key, now: float) -> asyncio.Task[ModelMetadata]:
        question = self._questions[key] = asyncio.get_running_loop().create_task(self._ask(key, now))
        question.add_done_callback(partial(self._answered, key))
        return question

    def _answered(self, key: Key, question: asyncio.Task[ModelMetadata]) -> None:
        del self._questions[key]
        if not question.cancelled():
            question.exception()  # whoever waited was told; nobody may have
