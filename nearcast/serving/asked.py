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

    `names` are the outputs that it wants, empty = all, and `read_at` is the instant at which its tensors were read. An
    `asker` waits for the end of the turn without a coroutine; None = nobody, or a coroutine does.
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
    host: ModelHost | None = None
    asker: Asker | None = None

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

    # For the run that it takes part in it is what a future is for a coroutine, if `asker` waits instead of one.

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.asker is None

    def set_result(self, timed: Timed) -> None:
        """The model has answered."""
        host, asker = self._leave()
        try:
            asker.answer(host.end(self, timed))
        except MeshError as error:
            asker.refuse(error)
        except Exception:  # noqa: BLE001 - the others of its run want their answers
            _LOG.exception("an answer of %s cannot be given", self.version.title)
            asker.refuse(MeshError(Code.INTERNAL, "The server failed on this request; its log says why."))

    def set_exception(self, error: MeshError) -> None:
        """It has failed or come too late."""
        host, asker = self._leave()
        host.fail(self, error)
        asker.refuse(error)

    def cancel(self) -> None:
        """The asker waits no longer, or the deadline has passed."""
        if self.asker is not None:
            host, _ = self._leave()
            host.fail(self, asyncio.CancelledError())

    def _leave(self) -> tuple[ModelHost, Asker]:
        host, asker, self.asker = self.host, self.asker, None
        assert host is not None
        assert asker is not None
        host.leave(self.version)
        return host, asker
