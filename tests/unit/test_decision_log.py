"""The decision log on disk: bounded, honest about what is missing, never in the way."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from benchmarks.accounting import Storm
from nearcast.errors import MeshError
from router.decision_log import SUFFIX, DecisionLog, DecisionLogConfig, make_policy
from router.policy import Policy, PolicyConfig
from router.policy.log import Start, decode
from simulations.replay import ReplayResult, read, replay

FAST = DecisionLogConfig(enabled=True, flush_ms=0.2, retry_ms=0.0, file_bytes_max=512 * 1024, files_max=3)
STEPS_MAX = 200


def begin(folder: Path, config: DecisionLogConfig) -> tuple[Storm, DecisionLog]:
    policy, log = make_policy(PolicyConfig(), 7, config, data_dir=folder, node="here")
    assert log is not None
    return Storm(policy, 7), log


def files(folder: Path) -> list[Path]:
    return sorted((folder / "decisions").glob(f"*{SUFFIX}"))


def number(path: Path) -> int:
    return int(path.name.split(".")[1])


def replay_files(paths: list[Path]) -> ReplayResult:
    result = replay(read(paths))
    assert result.identical, result.first
    return result


def test_off_is_the_plain_policy(tmp_path: Path) -> None:
    policy, log = make_policy(PolicyConfig(), 7, DecisionLogConfig(), data_dir=tmp_path, node="here")
    assert type(policy) is Policy
    assert log is None
    assert not files(tmp_path)


def test_everything_is_written_and_replays(tmp_path: Path) -> None:
    storm, log = begin(tmp_path, DecisionLogConfig(enabled=True))
    storm.run(2_000)
    log.close()
    (path,) = files(tmp_path)
    result = replay_files([path])
    assert result.decisions["decide"] == storm.events["send"]
    assert (result.gaps, result.skipped, log.lost) == ([], 0, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # What a crash cuts off at the end costs the last frame, no more.
    path.write_bytes(path.read_bytes()[:-3])
    assert 0 < replay_files([path]).records < result.records
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(MeshError, match="damaged at byte 0"):
        replay(read([path]))
    path.write_bytes(b"this is a poem and no log of decisions")
    with pytest.raises(MeshError, match="No decision log"):
        replay(read([path]))


def test_files_turn_and_each_can_be_replayed(tmp_path: Path) -> None:
    storm, log = begin(tmp_path, FAST)
    for _ in range(STEPS_MAX):
        storm.run(500)
        if files(tmp_path) and number(files(tmp_path)[-1]) >= FAST.files_max + 1:
            break
    log.close()
    kept = files(tmp_path)
    assert len(kept) == FAST.files_max
    assert number(kept[0]) > 0
    assert all(path.stat().st_size <= 2 * FAST.file_bytes_max + 256 * 1024 for path in kept)
    whole = replay_files(kept)
    assert (whole.gaps, whole.skipped, log.lost) == ([], 0, 0)
    assert sum(replay_files([path]).records for path in kept) == whole.records
    result = replay_files([kept[0], kept[2]])
    assert [lost for _, lost in result.gaps] == [0]
    # With other settings the policy begins with the targets alone.
    other = replay(read(kept), lambda config: msgspec.structs.replace(config, queue_wait_ms_max=1e-3))
    assert other.decisions["decide"] == whole.decisions["decide"]
    assert other.changes


def test_a_disk_that_fails_costs_records_and_says_so(tmp_path: Path) -> None:
    in_the_way = tmp_path / "decisions"
    in_the_way.write_text("no folder")
    storm, log = begin(tmp_path, FAST)
    for _ in range(STEPS_MAX):
        storm.run(50)
        if log.lost:
            break
    in_the_way.unlink()
    for _ in range(STEPS_MAX):
        storm.run(500)
        if files(tmp_path):
            break
    storm.run(500)
    log.close()
    first = next(iter(decode(files(tmp_path)[0].read_bytes())))
    assert isinstance(first, Start)
    assert 0 < first.lost <= log.lost
    assert replay_files(files(tmp_path)).records > 0


def test_a_slow_disk_drops_and_counts(tmp_path: Path) -> None:
    storm, log = begin(tmp_path, DecisionLogConfig(enabled=True, pending_max=1024, flush_ms=60_000))
    storm.run(5_000)
    log.close()
    result = replay_files(files(tmp_path))
    assert log.lost > 0
    assert result.records == 1024 - 1
    assert {metric.name: metric.samples[0].value for metric in log.collect()} == {
        "nearcast_decision_log_records": 1024,
        "nearcast_decision_log_lost": log.lost,
    }
