"""One request in the host, from its arrival to its answer: what is known of it, and who waits without a coroutine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import Asker, InferRequest, RequestContext, Tensors
from nearcast.serving.engines import Timed
from nearcast.serving.signature import Size

if TYPE_CHECKING:
    from nearcast.serving.host import ModelHost
    from nearcast.serving.slots import Slot
    from nearcast.serving.version import HotVersion

_LOG = logging.getLogger(__name__)
_NO_SIZE = Size(0, 0)


class Asked(msgspec.Struct, eq=False):
    """A request and the version that answers it. `in_flight` others were here when it `arrived`.

    `names` are the outputs that it wants, empty = all, and `read_at` is the instant at which its tensors were read.
    """

    slot: Slot
    version: HotVersion
    request: InferRequest
    context: RequestContext
    arrived: float
    in_flight: int
    inputs: Tensors = {}
    size: Size = _NO_SIZE
    names: Sequence[str] = ()
    read_at: float = 0.0

    def read(self, now: Callable[[], float]) -> None:
        """Read the tensors, unless it is too late.

        Raises:
            MeshError: DEADLINE; INVALID_REQUEST for what the version does not declare.
        """
        request, signature = self.request, self.version.signature
        if self.context.deadline is not None:
            self.context.require_time(self.arrived)
        self.inputs = inputs = request.decode()
        self.size = signature.check(inputs, request.form)
        self.names = names = request.requested_outputs()
        if names:
            signature.require_outputs(names)
        self.read_at = now()


class Answered:
    """A request that was answered at once."""

    __slots__ = ()

    def cancel(self) -> None:
        """There is nothing left of it."""


ANSWERED = Answered()


class Begun:
    """A request that nobody awaits. For the run that it takes part in it is what a future is for a coroutine."""

    __slots__ = ("_asked", "_asker", "_host")

    def __init__(self, host: ModelHost, asked: Asked, asker: Asker) -> None:
        self._host = host
        self._asked = asked
        # None = it is over.
        self._asker: Asker | None = asker

    def done(self) -> bool:
        """Whether it is over."""
        return self._asker is None

    def set_result(self, timed: Timed) -> None:
        """The model has answered."""
        asker = self._leave()
        try:
            asker.answer(self._host.end(self._asked, timed))
        except MeshError as error:
            asker.refuse(error)
        except Exception:  # noqa: BLE001 - the others of its run want their answers
            _LOG.exception("an answer of %s cannot be given", self._asked.version.title)
            asker.refuse(MeshError(Code.INTERNAL, "The server failed on this request; its log says why."))

    def set_exception(self, error: MeshError) -> None:
        """It has failed or come too late."""
        asker = self._leave()
        self._host.fail(self._asked, error)
        asker.refuse(error)

    def cancel(self) -> None:
        """Nobody waits for the answer any more, or its deadline has passed."""
        if self._asker is not None:
            self._leave()
            self._host.fail(self._asked, asyncio.CancelledError())

    def _leave(self) -> Asker:
        asker = self._asker
        assert asker is not None
        self._asker = None
        self._host.leave(self._asked.version)
        return asker
