"""Who uses a model now, and whether one tenant has more than its share of it: max-min fairness by counting.

A share is a part of what the fleet really carries, so it needs no configured capacity, and it is only asked for while a
queue stands: who is alone may use everything.
"""

from __future__ import annotations

RANKS = 4
"""How many classes of requests are told apart."""
_NAMELESS = "\0"


class Crowd:
    """The tenants of one model: open attempts in all, and how many tenants want something."""

    __slots__ = ("in_flight", "tenants")

    def __init__(self) -> None:
        self.in_flight = 0
        self.tenants: dict[str, Share] = {}


class Share:
    """What one tenant has of one model, by rank of request. `wanted`: something was asked for since the last sweep."""

    __slots__ = ("crowd", "parts", "wanted")

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.parts = tuple(Part(self) for _ in range(RANKS))
        self.wanted = True

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open."""
        return not any(part.in_flight for part in self.parts)

    def exceeded(self, rank: int) -> bool:
        """Whether the requests of this rank and above are more than the tenant's part, while others want something too.

        A tenant that floods with its lowest class does not lose the places of its highest.
        """
        crowd = self.crowd
        mine = sum(part.in_flight for part in self.parts[: rank + 1])
        return mine * len(crowd.tenants) > crowd.in_flight + 1


class Part:
    """The open attempts of one rank of a share."""

    __slots__ = ("in_flight", "share")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.in_flight = 0

    def enter(self) -> None:
        """One more attempt is open."""
        self.in_flight += 1
        self.share.crowd.in_flight += 1

    def leave(self) -> None:
        """One attempt less."""
        self.in_flight -= 1
        self.share.crowd.in_flight -= 1


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

    def share(self, model: str, tenant: str) -> Share:
        """The share of a tenant that wants something of a model now."""
        crowd = self._crowds.get(model)
        if crowd is not None:
            share = crowd.tenants.get(tenant)
            if share is not None:
                share.wanted = True
                return share
        return self._new(model, tenant)

    def sweep(self, now: float) -> None:
        """Forget who has wanted nothing for an idle time; called as often as one likes."""
        if now - self._swept_at < self._idle_s:
            return
        self._swept_at = now
        for model, crowd in list(self._crowds.items()):
            for tenant, share in list(crowd.tenants.items()):
                if share.is_idle and not share.wanted:
                    del crowd.tenants[tenant]
                    self._count -= 1
                share.wanted = False
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
        share.wanted = True
        return share
