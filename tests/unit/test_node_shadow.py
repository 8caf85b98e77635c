"""Which wish of an operator counts, and what is said about it."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.mqtt.shadow import NodeSettings, Shadow
from nearcast.errors import MeshError


def wish(version, **desired):
    return json.dumps({"version": version, "desired": desired}).encode()


def test_a_newer_wish_replaces_all_of_an_older_one():
    shadow = Shadow()
    assert shadow.read(wish(1, log_level="debug", metrics_interval_s=5))
    assert shadow.read(wish(2, log_level="error"))
    assert shadow.settings == NodeSettings(log_level="error")
    assert json.loads(shadow.report()) == {"version": 2, "reported": {"log_level": "error"}}


@given(st.lists(st.integers(1, 20), max_size=12))
def test_the_highest_version_holds_whatever_the_order_and_the_repetitions(versions):
    shadow = Shadow()
    told = [version for version in versions if shadow.read(wish(version, metrics_interval_s=version))]
    assert told == sorted(set(told))
    assert shadow.version == max(versions, default=0)
    assert shadow.settings.metrics_interval_s == max(versions, default=None)


@pytest.mark.parametrize(
    ("desired", "said"),
    [
        ({"log_level": "loud"}, "log_level"),
        ({"metrics_interval_s": -1}, "metrics_interval_s"),
        ({"admin": True}, "admin"),
        ({"streams": [{"name": "mic", "model": "vad"}, {"name": "mic", "model": "wake"}]}, "same name"),
        ({"streams": [{"name": "mic", "model": "vad", "window": 1, "hop": 2}]}, "hops further"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_answered_and_changes_nothing(desired, said):
    shadow = Shadow()
    shadow.read(wish(1, log_level="debug"))
    assert shadow.read(wish(2, **desired))
    reported = json.loads(shadow.report())
    assert reported["version"] == 2
    assert said in reported["problem"]
    assert reported["reported"] == {"log_level": "debug"}
    assert shadow.read(wish(3, log_level="info"))
    assert "problem" not in json.loads(shadow.report())


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"version": "2"}', b'{"version": 0}', b"[" * 100_000, b"\xff"])
def test_what_has_no_version_is_refused(payload):
    with pytest.raises(MeshError, match="version"):
        Shadow().read(payload)


def test_a_restart_forgets_neither_the_version_nor_the_settings():
    shadow = Shadow()
    shadow.read(wish(7, streams=[{"name": "mic", "model": "vad"}]))
    again = msgspec.json.decode(msgspec.json.encode(shadow), type=Shadow)
    assert again == shadow
    assert not again.read(wish(7, log_level="debug"))
