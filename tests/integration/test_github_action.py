"""The GitHub action: what it declares, and its steps as a runner would run them, against a real sync process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_sync.publisher.bundle import create_bundle, read_spec
from nearcast.cli.demo.bundles import write_sources
from tests.integration.sync_parts import Sync

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "github-action"
ACTION: dict[str, Any] = yaml.safe_load((FOLDER / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
SECRETS = {"team-key", "identity-key", "tenant-key"}


def test_it_declares_what_its_steps_use() -> None:
    used = set(re.findall(r"inputs\.([a-z-]+)", (FOLDER / "action.yml").read_text()))
    assert used == set(ACTION["inputs"])
    assert ACTION["runs"]["using"] == "composite"
    for name, declared in ACTION["inputs"].items():
        assert declared["description"], name
        assert declared.get("required") or "default" in declared, name
    assert all("A secret." in ACTION["inputs"][name]["description"] for name in SECRETS)
    assert {step["name"] for step in STEPS if step.get("if") == "always()"} == {"Forget the keys"}
    assert STEPS[-1]["name"] == "Forget the keys"


def test_no_input_is_pasted_into_a_script() -> None:
    """An expression inside of `run` would let a branch name or a commit message be executed."""
    for step in STEPS:
        assert "${{" not in step["run"], step["name"]
        assert step["shell"] == "bash"
        assert not {name for name in step.get("env", {}) if name not in step["run"]}, "each variable is used"


def test_the_guide_names_every_required_input_and_exit_code() -> None:
    guide = (FOLDER / "README.md").read_text()
    for name, declared in ACTION["inputs"].items():
        assert not declared.get("required") or f"{name}:" in guide
    from nearcast.cli.push import EXIT_CODES

    for code in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE):
        assert f"| {code} |" in guide


class Runner:
    """Runs the steps: expressions become values, a failed step skips those that are not for always."""

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "runner"
        self.temp.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        (commands / "nearcast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nearcast "$@"\n')
        (commands / "nearcast").chmod(0o755)
        self.environ = {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "RUNNER_TEMP": str(self.temp),
            "GITHUB_OUTPUT": str(folder / "output"),
        }
        self.modes: dict[str, int] = {}
        self.log = ""

    def run(self, **given: str) -> tuple[int, dict[str, str]]:
        """Exit code of the first step that failed, and the outputs of the step `push`."""
        Path(self.environ["GITHUB_OUTPUT"]).write_text("")
        inputs = {name: declared.get("default", "") for name, declared in ACTION["inputs"].items()}
        inputs |= {name.replace("_", "-"): value for name, value in given.items()}
        failed = 0
        for step in STEPS:
            if failed and step.get("if") != "always()":
                continue
            environ = {
                name: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: inputs[found[1]], value)
                for name, value in step.get("env", {}).items()
            }
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
                env=self.environ | environ, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            self.log += done.stdout + done.stderr
            failed = failed or done.returncode
            if step["name"] == "Write the keys":
                files = [path for path in self.temp.rglob("*") if path.is_file()]
                self.modes = {path.name: path.stat().st_mode & 0o777 for path in files}
        lines = Path(self.environ["GITHUB_OUTPUT"]).read_text().splitlines()
        return failed, dict(line.split("=", 1) for line in lines)


@pytest.fixture
def sync(tmp_path: Path) -> Iterator[Sync]:
    running = Sync(tmp_path / "mesh")
    yield running
    running.stop()


def test_it_pushes_starts_a_trial_and_forgets_the_keys(tmp_path: Path, sync: Sync) -> None:
    specs = write_sources(tmp_path / "sources")
    for name in ("digits-1", "digits-2"):
        create_bundle(read_spec(specs[name]), specs[name].parent, tmp_path / name)
    operator, runner = sync.operator, Runner(tmp_path)
    keys = {
        "control": sync.url,
        "team_key": (operator / "models-core.pem").read_text(),
        "identity_key": (operator / "identity" / "node.key").read_text(),
        "identity_certificate": (operator / "identity" / "node.pem").read_text(),
        "ca_certificate": (operator / "identity" / "ca.pem").read_text(),
        "root": (operator / "root.json").read_text(),
        "tenant_key": "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=",
        "reason": 'a; $(touch pwned) "`quoted`"',
    }
    code, outputs = runner.run(bundle=str(tmp_path / "digits-1"), share="", wait="", **keys)
    assert (code, outputs) == (0, {"code": "0", "model": "digits", "release": "1", "result": ""}), runner.log
    assert set(runner.modes.values()) == {0o600}
    assert {"models-core.pem", "node.key", "node.pem", "ca.pem", "root.json", "tenant.key"} == set(runner.modes)
    assert not (runner.temp / "nearcast").exists(), "the keys are gone"
    began = time.monotonic()
    code, outputs = runner.run(bundle=str(tmp_path / "digits-2"), share="0.2", wait="1", **keys)
    assert (code, outputs["result"], outputs["code"]) == (75, "waiting", "75"), "nobody follows this channel"
    assert time.monotonic() - began < 40
    with sync.connect() as client:
        (rollout,) = client.call("GET", "/v1/channels/stable")["rollouts"]
    assert (rollout["stable"]["release"], rollout["candidate"]["release"], rollout["share"]) == (1, 2, 0.2)
    assert rollout["reason"] == keys["reason"]
    assert not (runner.temp / "nearcast").exists(), "after a failure too"
    assert "PRIVATE KEY" not in runner.log
    assert json.dumps(keys["team_key"])[1:40] not in runner.log
    code, outputs = runner.run(bundle=str(tmp_path / "digits-1"), **(keys | {"team": "../evil"}))
    assert (code, outputs) == (64, {})
