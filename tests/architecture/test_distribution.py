"""What we ship: six packages, one console script, no Python beside the schema."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"nearcast", "router", "edge_node", "cloud_core", "model_sync", "simulations"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        env={"PATH": os.defpath},
        capture_output=True,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_our_six_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES


def test_the_wheel_holds_every_tracked_file_of_the_packages(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", *sorted(PACKAGES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert "nearcast/py.typed" in tracked
    assert tracked - packed == set()


def test_the_one_console_script_is_nearcast(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entries,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert archive.read(entries).decode().split() == ["[console_scripts]", "nearcast", "=", "nearcast.cli:main"]


def test_no_other_distribution_provides_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: owners[name] for name in PACKAGES & set(owners) if set(owners[name]) != {"nearcast"}} == {}


def test_no_python_lies_beside_the_schema() -> None:
    assert list((ROOT / "proto").rglob("*.proto")), "the schema has moved"
    assert list((ROOT / "proto").rglob("*.py*")) == [], "another distribution owns `import proto`"


def test_locks_pin_every_package_by_hash_and_hold_no_address() -> None:
    for lock in (ROOT / "constraints").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text, lock.name
        for line in text.splitlines():
            if line and not line.startswith((" ", "#")):
                assert "==" in line, f"{lock.name}: {line}"
                assert line.endswith("\\"), f"{lock.name}: {line} has no hash"


def test_every_extra_for_users_has_a_lock() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locks = {lock.stem for lock in (ROOT / "constraints").glob("*.txt")}
    assert {"edge", "cloud", "router", "sync", "demo"} <= locks & set(extras)
