"""`nearcast route replay` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from benchmarks.accounting import Storm
from nearcast.cli import main
from router.decision_log import DecisionLogConfig, make_policy
from router.policy import PolicyConfig
from router.policy.log import Start, decode, encode


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    config = DecisionLogConfig(enabled=True)
    policy, log = make_policy(PolicyConfig(), 3, config, data_dir=folder, node="here")
    assert log is not None
    Storm(policy, 3).run(2_000)
    log.close()
    return folder / "decisions"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["route", "replay", *arguments])


def test_the_same_decisions_are_identical(log: Path) -> None:
    said = run(str(log))
    assert said.exit_code == 0, said.output
    assert "all identical" in said.output
    (file,) = log.glob("*.decisions")
    found = json.loads(run(str(file), "--json").output)
    assert found["different"] == {}
    assert found["decisions"]["decide"] > 400
    assert (found["gaps"], found["skipped"], found["first"]) == ([], 0, None)


def test_other_settings_would_have_changed_some(log: Path) -> None:
    said = run(str(log), "--set", "policy.queue_wait_ms_max=0.001", "--set", "policy.attempts_max=1")
    assert said.exit_code == 0, said.output
    assert "would change" in said.output
    assert "first: record" in said.output
    found = json.loads(run(str(log), "--set", "policy.attempts_max=1", "--json").output)
    assert found["different"]["retry"] > 0
    assert "retry: no" in {change["to"] for change in found["changes"]}
    assert "nothing would change" in run(str(log), "--set", "policy.reserve_ms=1.0").output


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tail_weight=1", "looks like policy"),
        ("policy.tail_weight", "looks like policy"),
        ("policy.no_such=1", "no_such"),
        ("policy.tail_weight=much", "tail_weight"),
    ],
)
def test_a_setting_that_does_not_exist_is_said(log: Path, setting: str, words: str) -> None:
    said = run(str(log), "--set", setting)
    assert said.exit_code == 64
    assert words in said.output


def test_a_folder_without_a_log_is_said(tmp_path: Path) -> None:
    said = run(str(tmp_path))
    assert said.exit_code == 64
    assert "decisions" in said.output


def test_a_log_of_other_decisions_ends_with_1(log: Path, tmp_path: Path) -> None:
    (file,) = log.glob("*.decisions")
    start, *rest = decode(file.read_bytes())
    assert isinstance(start, Start)
    other = tmp_path / "other.decisions"
    other.write_bytes(encode([msgspec.structs.replace(start, seed=start.seed + 1), *rest]))
    said = run(str(other))
    assert said.exit_code == 1
    assert "differ" in said.output
