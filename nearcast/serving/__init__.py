"""The model host: versions in memory, batching, sequences, statistics. `nearcast.serving.batching` is pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearcast.serving.host import ModelHost
    from nearcast.serving.limits import HostLimits

__all__ = ["HostLimits", "ModelHost"]


def __getattr__(name: str) -> Any:
    """Import the host only when asked for: the simulator takes the pure batching from this package and nothing else."""
    if name == "ModelHost":
        from nearcast.serving.host import ModelHost

        return ModelHost
    if name == "HostLimits":
        from nearcast.serving.limits import HostLimits

        return HostLimits
    raise AttributeError(name)
