"""`nearcast bundle` as a person meets it: licences, seals, what inspect shows, and how a refusal ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nearcast.cli import main
from tests.tiny_models import affine_model

SPEC = """
name = "affine"
release = 3
semver = "1.2.0"
engine = "onnxruntime"
model_file = "affine.onnx"
licence = "GPL-3.0-only"
golden = ["one.npz"]
quality = 0.9
parent = 1
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 4], batch_axis = 0 }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 4], batch_axis = 0 }]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "affine.onnx").write_bytes(affine_model())
    np.savez(source / "one.npz", in_x=np.ones((1, 4), np.float32))
    (source / "spec.toml").write_text(SPEC)
    (tmp_path / "operator").mkdir()
    return tmp_path


def run(home: Path, *arguments: Any, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["bundle", *map(str, arguments)], env={"NEARCAST_HOME": str(home)})
    assert done.exit_code == code, done.output
    return done


def create(home: Path, *more: Any, code: int = 0) -> Result:
    return run(home, "create", "--spec", home / "source" / "spec.toml", "--out", home / "bundle", *more, code=code)


def test_a_licence_is_refused_and_allowed(home: Path) -> None:
    refused = create(home, code=77)
    assert "'GPL-3.0-only' is not on the allow-list; to allow it, add it to `licences_allowed`" in refused.output
    (home / "operator" / "policy.toml").write_text('licences_allowed = ["GPL-3.0-only"]')
    assert "affine release 3" in create(home).output


def test_inspect_shows_everything(home: Path) -> None:
    (home / "operator" / "policy.toml").write_text('licences_allowed = ["GPL-3.0-only"]')
    run(home, "key", home / "keys.key", code=0)
    sealed = create(home, "--seal-with", home / "keys.key", "--tenant", "acme")
    assert "sealed for acme" in sealed.output
    said = json.loads(run(home, "inspect", home / "bundle", "--tenant-keys", home, "--json").output)
    assert (said["licence"], said["quality"], said["parent"], said["sbom_file"]) == (
        "GPL-3.0-only",
        0.9,
        1,
        "sbom.cdx.json",
    )
    assert said["encryption"]["tenant"] == "acme"
    assert said["size_bytes"] == sum(entry["size_bytes"] for entry in said["files"])
    assert len(said["golden"]) == 1
    assert said["sbom"]["metadata"]["component"]["name"] == "affine"
    assert {tensor["name"] for tensor in (*said["inputs"], *said["outputs"])} == {"x", "y"}
    table = run(home, "inspect", home / "bundle").output
    for text in (
        "AES-256-GCM for tenant acme",
        "sealed; --tenant-keys opens it",
        "release 1",
        "GPL-3.0-only",
        "affine.onnx",
    ):
        assert text in table
    assert json.loads(run(home, "inspect", home / "bundle", "--json").output)["sbom"] is None
    assert "passes its gate" in run(home, "verify", home / "bundle", "--tenant-keys", home).output
    assert "put its file into the folder of tenant keys" in run(home, "verify", home / "bundle", code=77).output


def test_a_seal_needs_key_and_tenant(home: Path) -> None:
    run(home, "key", home / "keys.key")
    assert "go together" in create(home, "--tenant", "acme", code=2).output
    assert "go together" in create(home, "--seal-with", home / "keys.key", code=2).output
    assert "lower-case" in create(home, "--seal-with", home / "keys.key", "--tenant", "A b", code=2).output
    (home / "keys.key").chmod(0o644)
    assert "readable by you alone" in create(home, "--seal-with", home / "keys.key", "--tenant", "acme", code=77).output
