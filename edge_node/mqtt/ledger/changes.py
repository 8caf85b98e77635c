"""What a transaction did to the outbox and what it gave up, gathered until it is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edge_node.mqtt.ledger.records import Committed, Outgoing


class Changes:
    """The changes of one transaction; and drops that no dead letter has told of yet."""

    def __init__(self) -> None:
        self._added: list[Outgoing] = []
        self._dropped: set[int] = set()
        self._reasons: Counter[str] = Counter()
        self.untold: Counter[str] = Counter()

    def add(self, outgoing: Outgoing) -> Outgoing:
        """A row of the outbox came."""
        self._added.append(outgoing)
        return outgoing

    def drop(self, reason: str, count: int, outbox_rows: Sequence[int] = ()) -> None:
        """`count` messages went without reaching anybody; those of the outbox had these rows."""
        self._dropped.update(outbox_rows)
        if count:
            self._reasons[reason] += count

    def committed(self) -> Committed | None:
        """What the transaction that was just committed did; None if that concerns nobody."""
        if not self._added and not self._reasons:
            return None
        committed = Committed(tuple(self._added), frozenset(self._dropped), dict(self._reasons))
        self.untold.update(self._reasons)
        self.rolled_back()
        return committed

    def rolled_back(self) -> None:
        """Nothing of it happened."""
        self._added.clear()
        self._dropped.clear()
        self._reasons.clear()
