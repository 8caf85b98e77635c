"""PUBACKs go out in the order of the messages [MQTT-4.6.0-2], though what they wait for ends in any order. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nearcast.transport.mqtt.message import Message


@dataclass(slots=True, eq=False)
class Ticket:
    """One message that is not acknowledged yet."""

    message: Message
    ready: bool = False


class AckWindow:
    """The unacknowledged messages of one connection."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def open(self, message: Message) -> Ticket:
        """Take in a message."""
        ticket = Ticket(message)
        self._tickets.append(ticket)
        return ticket

    def complete(self, ticket: Ticket) -> list[Message]:
        """Mark a message as safe; returns those that may be acknowledged now, in order."""
        ticket.ready = True
        out = []
        while self._tickets and self._tickets[0].ready:
            out.append(self._tickets.popleft().message)
        return out
