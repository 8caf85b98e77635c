"""Answers of stateless models that allow it, remembered: the least recently used go first, one run for equal requests.

The key is a digest of everything that makes the answer: the version's manifest, with the digests of its files, the
tenant, so that nobody learns from timing what others asked, and the tensors. A new version has another manifest: what
the old one answered is never found again and ages out.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.clock import Clock
from nearcast.handler import RequestContext, Tensors
from nearcast.serving.dispatch import expired
from nearcast.serving.engines import Outputs, Timed
from nearcast.serving.statistics import Statistics
from nearcast.wire.tensors import to_raw

_ENTRY_SIZE_BYTES = 512
"""What an entry costs beside its tensors, and about a tensor's own."""


class ResponseCache:
    """The cache of one host; lives on its loop. Holds whole answers: a request for some of the outputs finds them too.

    Attributes:
        size_bytes: of all answers.
    """

    def __init__(self, size_bytes_max: int, clock: Clock) -> None:
        self.size_bytes = 0
        self._size_bytes_max = size_bytes_max
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Outputs, int]] = OrderedDict()
        self._flights: dict[bytes, asyncio.Future[Outputs | None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    async def answer(
        self,
        salt: bytes,
        inputs: Tensors,
        context: RequestContext,
        statistics: Statistics,
        run: Callable[[], Awaitable[Timed]],
    ) -> Timed:
        """The remembered answer, or what `run` gives, which is then remembered.

        Of equal requests at the same time one runs and the others wait for it; if it fails the next one tries.

        Raises:
            MeshError: DEADLINE if it passes while another runs, or what `run` raises.
        """
        began = self._clock.monotonic()
        key = digest(salt, context.tenant, inputs)
        outputs = self._find(key)
        while outputs is None and (flight := self._flights.get(key)) is not None:
            try:
                async with asyncio.timeout(context.remaining_s(self._clock.monotonic())):
                    outputs = await asyncio.shield(flight)
            except TimeoutError:
                raise expired() from None
        now = self._clock.monotonic()
        elapsed_us = int((now - began) * 1e6)
        if outputs is not None:
            statistics.hit(elapsed_us)
            return outputs, now, now
        statistics.miss(elapsed_us)
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        try:
            outputs, started, ended = await run()
            outputs = self._keep(key, outputs)
        finally:
            del self._flights[key]
            flight.set_result(outputs)
        return outputs, started, ended

    def _find(self, key: bytes) -> Outputs | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def _keep(self, key: bytes, outputs: Outputs) -> Outputs:
        """Remember a copy of its own: a part of a batch would hold on to the whole."""
        kept = {name: np.array(tensor) for name, tensor in outputs.items()}
        for tensor in kept.values():
            tensor.flags.writeable = False
        size_bytes = _ENTRY_SIZE_BYTES + sum(map(_size_bytes, kept.values()))
        if size_bytes > self._size_bytes_max:
            return kept
        self._entries[key] = kept, size_bytes
        self.size_bytes += size_bytes
        while self.size_bytes > self._size_bytes_max:
            _, (_, freed) = self._entries.popitem(last=False)
            self.size_bytes -= freed
        return kept


def digest(salt: bytes, tenant: str, inputs: Tensors) -> bytes:
    """SHA-256 of a request: `salt` names the version. Different requests never give the same bytes to hash."""
    state = hashlib.sha256(salt)
    heads = [(name, inputs[name].dtype.str, inputs[name].shape) for name in sorted(inputs)]
    state.update(repr((tenant, heads)).encode())
    for name, _, _ in heads:
        # The heads give the length of all but BYTES, whose elements say their own.
        state.update(to_raw(inputs[name]))
    return state.digest()


def _size_bytes(tensor: npt.NDArray[Any]) -> int:
    objects = sum(map(len, tensor.reshape(-1).tolist())) if tensor.dtype.hasobject else 0
    return _ENTRY_SIZE_BYTES + tensor.nbytes + objects
