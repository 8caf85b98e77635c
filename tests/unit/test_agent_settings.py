"""What a node writes for its agent is what the agent reads."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model_sync.agent.config import AgentConfig, AgentLimits
from nearcast.telemetry import Telemetry
from router.serving_config import AgentSettings, ServingConfig
from router.serving_node import ServingNode


def written(tmp_path: Path, **settings: Any) -> AgentConfig:
    config = ServingConfig(data_dir=str(tmp_path), tenant_keys=str(tmp_path / "keys"), agent=AgentSettings(**settings))
    node = ServingNode(config, Telemetry("edge"), role="edge", tier="local", identity=None, find_targets=False)
    return msgspec.convert(tomllib.loads(node._agent_toml()), AgentConfig)


def test_the_defaults_agree(tmp_path: Path) -> None:
    config = written(tmp_path)
    assert config.limits == AgentLimits()
    expected = AgentConfig()
    for name in ("channel", "poll_s", "probation_s", "mirrors", "on_delta_failure", "metered", "apply_spread_s"):
        assert getattr(config, name) == getattr(expected, name), name


@pytest.mark.parametrize("name", ["quota_bytes", "download_bytes_per_s_max", "download_bytes_per_day_max"])
def test_bounds_reach_the_limits(tmp_path: Path, name: str) -> None:
    assert getattr(written(tmp_path, **{name: 12345}).limits, name) == 12345


def test_policies_reach_the_agent(tmp_path: Path) -> None:
    settings = {
        "mirrors": ("/media/usb", "s3://b/p"),
        "metered": True,
        "on_delta_failure": "fail",
        "apply_spread_s": 9.0,
    }
    config = written(tmp_path, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.tenant_keys == str((tmp_path / "keys").resolve())
