"""What a cloud core is told."""

from __future__ import annotations

from router.serving_config import AgentSettings, ServingConfig


class CloudConfig(ServingConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One cloud core: a serving node that is asked by routers and follows the channel `cloud`."""

    name: str = "cloud-1"
    data_dir: str = ".nearcast/cloud-1"
    agent: AgentSettings = AgentSettings(channel="cloud")
