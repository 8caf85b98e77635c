"""Counters of several workers as one metric with the label `tenant`: Prometheus takes each name once."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

_PREFIX, _RENAMED = "nc_mqtt_", "nc_mqtt_tenant_"


class TenantMetrics(Collector):
    """Shows in `shown` what the registries of tenants hold, as `nc_mqtt_tenant_…`."""

    def __init__(self, shown: CollectorRegistry) -> None:
        self._registries: dict[str, CollectorRegistry] = {}
        shown.register(self)

    def registry(self, tenant: str) -> CollectorRegistry:
        """The registry of a tenant's worker."""
        return self._registries.setdefault(tenant, CollectorRegistry())

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for tenant, registry in self._registries.items():
            for family in registry.collect():
                name = _renamed(family.name)
                merged = families.setdefault(name, Metric(name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {"tenant": tenant, **sample.labels}
                    merged.samples.append(sample._replace(name=_renamed(sample.name), labels=labels))
        return families.values()


def _renamed(name: str) -> str:
    return name.replace(_PREFIX, _RENAMED, 1)
