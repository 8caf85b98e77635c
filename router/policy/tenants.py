"""Who uses a model now, and whether one tenant has more than its share of it: max-min fairness by counting.

A share is a part of what the fleet really carries, so it needs no configured capacity, and it is only asked for while a
queue stands: who is alone may use everything.
"""

from __future__ import annotations

_NAMELESS = "\0"


class Crowd:
    """The tenants of one model: open attempts in all, and how many tenants want something."""

    __slots__ = ("in_flight", "tenants")

    def __init__(self) -> None:
        self.in_flight = 0
        self.tenants: dict[str, Share] = {}


class Share:
    """What one tenant has of one model. `wanted` is a clock bit: something was asked for since the last sweep."""

    __slots__ = ("crowd", "in_flight", "wanted")

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.in_flight = 0
        self.wanted = True

    def enter(self) -> None:
        """One more attempt is open."""
        self.in_flight += 1
        self.crowd.in_flight += 1

    def leave(self) -> None:
        """One attempt less."""
        self.in_flight -= 1
        self.crowd.in_flight -= 1

    @property
    def exceeded(self) -> bool:
        """Whether one more request would be more than this tenant's part, while others want something, too."""
        crowd = self.crowd
        return self.in_flight * len(crowd.tenants) > crowd.in_flight + 1


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
                if share.in_flight == 0 and not share.wanted:
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
