"""What an operator wishes of a node (`desired`) and what it does (`reported`). Pure."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from nearcast.errors import Code, MeshError

INTERVAL_S_MAX = 86_400.0
LogLevel = Literal["debug", "info", "warning", "error"]


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What can be set from afar. What is not named stays as the node's own configuration has it.

    Attributes:
        log_level: from which level up the node logs.
        metrics_interval_s: seconds between two messages on `metrics`; 0 = none.
        streams: all of them; they take the place of the configured ones.
    """

    log_level: LogLevel | None = None
    metrics_interval_s: Annotated[float, msgspec.Meta(ge=0, le=INTERVAL_S_MAX)] | None = None
    streams: tuple[StreamDefinition, ...] | None = None


class _Wish(msgspec.Struct, frozen=True, kw_only=True):
    version: Annotated[int, msgspec.Meta(ge=1)]
    desired: msgspec.Raw = msgspec.Raw(b"{}")


class Shadow(msgspec.Struct, kw_only=True):
    """The last wish that was read, kept as a file so that neither a restart nor an empty broker undoes it.

    Attributes:
        version: of that wish; an equal or smaller one is not read (0 = there was none).
        settings: of the last wish that could be fulfilled.
        problem: why the last one could not; "" = it is fulfilled.
    """

    version: int = 0
    settings: NodeSettings = NodeSettings()
    problem: str = ""

    def read(self, payload: bytes) -> bool:
        """Take in a message on `desired`; returns whether there is something new to report.

        A wish that cannot be understood changes the version and nothing else: it is answered, not asked for again.

        Raises:
            MeshError: INVALID_REQUEST if it has not even a version, so that nothing can be said about it.
        """
        try:
            wish = msgspec.json.decode(payload, type=_Wish)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = f"A wish must be a JSON object with version (from 1) and desired: {error}."
            raise MeshError(Code.INVALID_REQUEST, reason) from error
        if wish.version <= self.version:
            return False
        self.version = wish.version
        try:
            settings = msgspec.json.decode(wish.desired, type=NodeSettings)
            by_name(settings.streams or ())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            self.problem = str(error)
        else:
            self.settings, self.problem = settings, ""
        return True

    def report(self) -> bytes:
        """The message for `reported`."""
        said: dict[str, object] = {"version": self.version, "reported": self.settings}
        return msgspec.json.encode(said | ({"problem": self.problem} if self.problem else {}))
