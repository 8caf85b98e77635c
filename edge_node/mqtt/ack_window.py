"""PUBACKs go out in the order of the messages [MQTT-4.6.0-2], though what they wait for ends in any order. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Ticket:
    """One message that is not acknowledged yet: its packet identifier, when it came, and what its payload takes."""

    mid: int
    opened: float
    size_bytes: int
    ready: bool = False


class AckWindow:
    """The unacknowledged messages of one connection, `size_bytes` together."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, mid: int, now: float, size_bytes: int) -> Ticket:
        """Take in a message."""
        ticket = Ticket(mid, now, size_bytes)
        self.size_bytes += size_bytes
        self._tickets.append(ticket)
        return ticket

    def complete(self, ticket: Ticket) -> list[int]:
        """Mark a message as safe, as often as you like; returns those that may be acknowledged now, in order."""
        ticket.ready = True
        return self._pop()

    def complete_older(self, opened: float) -> tuple[list[int], int]:
        """Give up waiting for messages that came before `opened`; returns as `complete`, and how many were not safe."""
        late = 0
        for ticket in self._tickets:
            if ticket.opened >= opened:
                break
            late += not ticket.ready
            ticket.ready = True
        return self._pop(), late

    def _pop(self) -> list[int]:
        out = []
        while self._tickets and self._tickets[0].ready:
            ticket = self._tickets.popleft()
            self.size_bytes -= ticket.size_bytes
            out.append(ticket.mid)
        return out
