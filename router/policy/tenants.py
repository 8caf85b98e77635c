"""Who uses a model now, and whether one tenant has more than its share of it: max-min fairness by counting.

A share is a part of what the fleet really carries, so it needs no configured capacity, and it is only asked for while a
queue stands: who is alone may use everything. Tenants are compared class by class, with those who want something of
that class or a higher one. A lower class has no say, except against the highest: anybody could call everything that.
"""

from __future__ import annotations

RANKS = 4
"""How many classes of requests are told apart."""
_NAMELESS = "\0"


class Crowd:
    """The tenants of one model: by rank the open attempts, and how many tenants want that rank or a higher one."""

    __slots__ = ("in_flight", "tenants", "wanting")

    def __init__(self) -> None:
        self.in_flight = [0] * RANKS
        self.wanting = [0] * RANKS
        self.tenants: dict[str, Share] = {}


class Share:
    """What one tenant has of one model, by rank of request.

    `wanted` is the highest rank asked for since the last sweep, `rank` the one that the tenant counts with.
    """

    __slots__ = ("crowd", "parts", "rank", "wanted")

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.parts = tuple(Part(crowd, rank) for rank in range(RANKS))
        self.rank = self.wanted = RANKS

    def want(self, rank: int) -> None:
        """Something of this rank is asked for, higher than all since the last sweep."""
        self.wanted = rank
        if rank < self.rank:
            self._count_with(rank)

    def sweep(self) -> bool:
        """Count with what was wanted since the last time, and what is open. False = nothing at all."""
        held = next((rank for rank, part in enumerate(self.parts) if part.in_flight), RANKS)
        self._count_with(min(held, self.wanted))
        self.wanted = RANKS
        return self.rank < RANKS

    def exceeded(self, rank: int) -> bool:
        """Whether the requests of this rank and above are more than the tenant's part of all such.

        A tenant that floods with its lowest class does not lose the places of its highest. Those of the highest are
        compared with everything: they are the tenant's part of the model at most, even if nobody else has such.
        """
        crowd = self.crowd
        mine = sum(part.in_flight for part in self.parts[: rank + 1])
        last = rank + 1 if rank else RANKS
        return mine * crowd.wanting[last - 1] > sum(crowd.in_flight[:last]) + 1

    def _count_with(self, rank: int) -> None:
        wanting = self.crowd.wanting
        for each in range(rank, self.rank):
            wanting[each] += 1
        for each in range(self.rank, rank):
            wanting[each] -= 1
        self.rank = rank


class Part:
    """The open attempts of one rank of a share."""

    __slots__ = ("_crowd", "_rank", "in_flight")

    def __init__(self, crowd: Crowd, rank: int) -> None:
        self._crowd = crowd
        self._rank = rank
        self.in_flight = 0

    def enter(self) -> None:
        """One more attempt is open."""
        self.in_flight += 1
        self._crowd.in_flight[self._rank] += 1

    def leave(self) -> None:
        """One attempt less."""
        self.in_flight -= 1
        self._crowd.in_flight[self._rank] -= 1


class Tenants:
    """All shares of one router; at most `shares_max` of them, later tenants have one share of the model together."""

    __slots__ = ("_count", "_crowds", "_idle_s", "_shares_max", "_swept_at")

    def __init__(self, *, shares_max: int, idle_s: float) -> None:
        self._shares_max = shares_max
        self._idle_s = idle_s
        self._swept_at = 0.0
        self._crowds: dict[str, Crowd] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def known(self, model: str, tenant: str) -> Share | None:
        """The share that a tenant has of a model, its own or a common one; None = neither. Changes nothing."""
        crowd = self._crowds.get(model) or self._crowds.get(_NAMELESS)
        return (crowd.tenants.get(tenant) or crowd.tenants.get(_NAMELESS)) if crowd is not None else None

    def share(self, model: str, tenant: str, rank: int) -> Share:
        """The share of a tenant that wants something of this rank of a model now."""
        crowd = self._crowds.get(model)
        share = crowd.tenants.get(tenant) if crowd is not None else None
        if share is None:
            share = self._new(model, tenant)
        if rank < share.wanted:
            share.want(rank)
        return share

    def sweep(self, now: float) -> None:
        """Forget who has wanted nothing for an idle time; called as often as one likes."""
        if now - self._swept_at < self._idle_s:
            return
        self._swept_at = now
        for model, crowd in list(self._crowds.items()):
            for tenant, share in list(crowd.tenants.items()):
                if not share.sweep():
                    del crowd.tenants[tenant]
                    self._count -= 1
            if not crowd.tenants:
                del self._crowds[model]

    def _new(self, model: str, tenant: str) -> Share:
        if self._count >= self._shares_max:
            model = model if model in self._crowds else _NAMELESS
            tenant = _NAMELESS
        crowd = self._crowds.setdefault(model, Crowd())
        share = crowd.tenants.get(tenant)
        if share is None:
            # The shares without a name come on top of the bound: one for each model that is known, one for the rest.
            share = crowd.tenants[tenant] = Share(crowd)
            self._count += 1
        return share
