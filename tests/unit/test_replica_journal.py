"""The journal under torn writes, the private field of the TUF client, and small parts of the agent."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
from pathlib import Path

import pytest
from tuf.api import exceptions
from tuf.ngclient import Updater

from model_sync.agent.journal import Journal, read_journal
from model_sync.agent.metadata import decode_channel, explain, set_reference_time
from model_sync.publisher.keys import init_keys
from model_sync.replica.state import Goal, Memory, State
from nearcast.clock import ManualClock
from nearcast.clock_store import ClockFloor
from nearcast.errors import Code, MeshError
from nearcast.store.pointer import Pointer

MEMORY = Memory(
    model="digits", state=State.PROBATION, committed=1, gated={"1": "1" * 64}, goal=Goal(release=2, sha256="2" * 64),
    previous=Pointer(stable=1),
)  # fmt: skip


def test_the_last_record_of_each_model_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", size_bytes_max=65536)
    journal.append(Memory(model="digits", intent=1))
    journal.append(Memory(model="vad", intent=1))
    journal.append(MEMORY)
    assert read_journal(tmp_path / "journal") == {"digits": MEMORY, "vad": Memory(model="vad", intent=1)}


def test_any_torn_end_leaves_the_record_before(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, size_bytes_max=65536)
    first = Memory(model="digits", intent=1)
    journal.append(first)
    whole = len(path.read_bytes())
    journal.append(MEMORY)
    data = path.read_bytes()
    for cut in range(whole, len(data) - 1):
        path.write_bytes(data[:cut])
        assert read_journal(path) == {"digits": first}
    for flipped in range(whole, len(data) - 1):
        path.write_bytes(data[:flipped] + bytes([data[flipped] ^ 4]) + data[flipped + 1 :])
        assert read_journal(path) == {"digits": first}


def test_records_after_a_torn_one_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, size_bytes_max=65536).append(Memory(model="digits", intent=1))
    with path.open("ab") as file:
        file.write(b"1234abcd {torn")
    Journal(path, size_bytes_max=65536).append(MEMORY)
    assert read_journal(path) == {"digits": MEMORY}


def test_the_journal_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, size_bytes_max=4096)
    for intent in range(200):
        journal.append(Memory(model="digits", intent=intent))
        assert path.stat().st_size <= 4096 + 1024
    assert read_journal(path)["digits"].intent == 199


def test_a_journal_on_a_full_disk_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, size_bytes_max=65536)
    journal.append(Memory(model="digits", intent=1))
    real_write = __import__("os").write
    monkeypatch.setattr("os.write", lambda handle, data: real_write(handle, data[:10]))
    with pytest.raises(OSError, match="does not fit"):
        journal.append(MEMORY)
    monkeypatch.undo()
    assert read_journal(path)["digits"].intent == 1
    journal.append(MEMORY)
    assert read_journal(path)["digits"] == MEMORY


def test_the_reference_time_of_the_client_is_ours(tmp_path: Path) -> None:
    """Pinned: python-tuf offers no public way. If this fails after an upgrade, look at `set_reference_time`."""
    assert importlib.metadata.version("tuf").startswith("7.")
    init_keys(tmp_path / "home")
    root = (tmp_path / "home" / "operator" / "root.json").read_bytes()
    updater = Updater(str(tmp_path / "metadata"), "http://127.0.0.1:1/", bootstrap=root)
    assert isinstance(updater._trusted_set.reference_time, dt.datetime)
    set_reference_time(updater, 4_000_000_000.0)
    assert updater._trusted_set.reference_time == dt.datetime.fromtimestamp(4_000_000_000, dt.UTC)
    assert updater._trusted_set.root.is_expired(updater._trusted_set.reference_time)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (exceptions.ExpiredMetadataError("timestamp.json is expired"), Code.UNTRUSTED, "installs nothing"),
        (exceptions.BadVersionNumberError("x"), Code.UNTRUSTED, "older than what is known"),
        (exceptions.UnsignedMetadataError("x"), Code.UNTRUSTED, "not signed by the keys"),
        (exceptions.LengthOrHashMismatchError("x"), Code.UNTRUSTED, "not the signed ones"),
        (exceptions.SlowRetrievalError(), Code.UNAVAILABLE, "nothing came in time"),
        (exceptions.DownloadError("refused."), Code.UNAVAILABLE, "cannot be checked: refused. The node serves on."),
        (exceptions.RepositoryError(""), Code.UNTRUSTED, "it is malformed"),
    ],
)
def test_what_the_client_says_becomes_a_sentence(error: Exception, code: Code, text: str) -> None:
    explained = explain(error, "http://sync")
    assert explained.code is code
    assert text in explained.message


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b'{"channel": "other", "intent": 1}',
        b'{"channel": "stable", "intent": 0}',
        b'{"channel": "stable", "intent": 1, "surprise": 1}',
        b'{"channel": "stable", "intent": 1, "rollouts": [%s, %s]}'
        % ((b'{"model": "a", "stable": {"release": 1, "manifest_sha256": "%s"}}' % (b"0" * 64),) * 2),
    ],
)
def test_a_wrong_channel_document_is_refused(data: bytes) -> None:
    with pytest.raises(MeshError) as caught:
        decode_channel(data, "stable", 10)
    assert caught.value.code is Code.UNTRUSTED


def test_the_floor_is_durable(tmp_path: Path) -> None:
    clock = ManualClock(wall=1_800_000_000.0)
    floor = ClockFloor(tmp_path / "clock.json", clock, build_time=0)
    floor.verified(floor.read())
    reborn = ClockFloor(tmp_path / "clock.json", ManualClock(wall=5.0), build_time=0)
    assert reborn.read().now == 1_800_000_000.0
    assert reborn.is_behind
    (tmp_path / "clock.json").write_bytes(b"torn")
    assert ClockFloor(tmp_path / "clock.json", clock, build_time=1_790_000_000).floor == 1_790_000_000
