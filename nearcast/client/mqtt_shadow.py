"""Settings that somebody wishes a device to have (`desired`), and those that it has (`reported`). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from nearcast.errors import Code, MeshError


class _Wish(msgspec.Struct, frozen=True, kw_only=True):
    version: Annotated[int, msgspec.Meta(ge=1)]
    desired: dict[str, Any] = {}


class Shadow:
    """Only a wish with a higher version than any before counts: older ones arrive late, equal ones again.

    Attributes:
        version: of the last wish that was read; 0 = none.
        problem: why the device could not follow it; "" = it did.
    """

    def __init__(self) -> None:
        self.version = 0
        self.problem = ""
        self._settings: Mapping[str, Any] = {}

    def read(self, payload: bytes) -> dict[str, Any] | None:
        """The settings that a message on `desired` wishes for; None if it is no newer than the last one.

        Raises:
            MeshError: INVALID_REQUEST if it cannot be read.
        """
        try:
            wish = msgspec.json.decode(payload, type=_Wish)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = f"A wish must be a JSON object with version (from 1) and desired: {error}."
            raise MeshError(Code.INVALID_REQUEST, reason) from error
        if wish.version <= self.version:
            return None
        self.version = wish.version
        return wish.desired

    def has(self, settings: Mapping[str, Any]) -> None:
        """The wish was followed; these are the settings now."""
        self._settings, self.problem = settings, ""

    def report(self) -> bytes:
        """The message for `reported`."""
        said: dict[str, Any] = {"version": self.version, "reported": self._settings}
        return msgspec.json.encode(said | ({"problem": self.problem} if self.problem else {}))
