"""The locks: hashed, without addresses, of one mind, and no heavier than the role needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "constraints"
LOCKS = sorted(path.stem for path in FOLDER.glob("*.txt"))
ROLES = ("edge", "cloud", "router", "sync")
FOREIGN = {
    "magika",
    "pymicro-wakeword",
    "tritonclient",
    "scikit-learn",
    "scipy",
    "torch",
    "ray",
    "pytest",
    "onnx",
    "iotcore",
}


def pins(name: str) -> dict[tuple[str, str], str]:
    """Version by (package, environment marker)."""
    text = (FOLDER / f"{name}.txt").read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)(?: ; ([^\\\n]+?))?(?: \\)?$", text, re.MULTILINE)
    return {(package, marker.strip()): version for package, version, marker in found}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_hashed_and_names_no_address(name):
    text = (FOLDER / f"{name}.txt").read_text()
    assert "://" not in text
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)
    assert pins(name)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)


@pytest.mark.parametrize("name", [*ROLES, "demo", "dev"])
def test_locks_agree_with_the_resolution_of_everything(name):
    versions: dict[str, set[str]] = {}
    for (package, _), version in pins("all").items():
        versions.setdefault(package, set()).add(version)
    for (package, _), version in pins(name).items():
        assert version in versions[package], package


@pytest.mark.parametrize("name", ROLES)
def test_a_role_installs_nothing_of_the_demo_or_of_development(name):
    assert not {package for package, _ in pins(name)} & FOREIGN


def test_only_nodes_with_devices_install_mqtt_and_only_serving_roles_an_engine():
    packages = {name: {package for package, _ in pins(name)} for name in ROLES}
    assert [name for name in ROLES if "mqtt5" in packages[name]] == ["edge"]
    assert "onnxruntime" not in packages["router"]
    assert "ai-edge-litert" not in packages["cloud"]
