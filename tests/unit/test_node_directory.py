"""The directory forgets who falls silent and never grows beyond its bound."""

from __future__ import annotations

import msgspec
import pytest

from model_sync.controller.node_directory import Announcement, NodeDirectory
from nearcast.errors import Code, MeshError


def test_a_silent_node_leaves() -> None:
    directory = NodeDirectory(nodes_max=10, ttl_s=30.0, began=0.0)
    directory.announce(0.0, "b", "edge", Announcement(addresses={"grpc": "h:1"}))
    directory.announce(20.0, "a", "cloud", Announcement(models={"m": {"stable": 2}}))
    assert [(row["name"], row["seen_s_ago"]) for row in directory.rows(30.0)] == [("a", 10.0), ("b", 30.0)]
    assert [row["name"] for row in directory.rows(30.5)] == ["a"]
    directory.announce(31.0, "b", "edge", Announcement())
    directory.remove("a")
    directory.remove("nobody")
    assert [row["name"] for row in directory.rows(31.0)] == ["b"]


def test_a_new_directory_says_that_it_lacks_nodes() -> None:
    directory = NodeDirectory(nodes_max=2, ttl_s=90.0, began=1000.0)
    assert not directory.is_complete(1000.0)
    assert not directory.is_complete(1029.0)
    assert directory.is_complete(1030.0)


def test_it_is_bounded_but_known_nodes_may_speak() -> None:
    directory = NodeDirectory(nodes_max=2, ttl_s=30.0, began=0.0)
    for name in ("a", "b"):
        directory.announce(0.0, name, "edge", Announcement())
    with pytest.raises(MeshError) as caught:
        directory.announce(1.0, "c", "edge", Announcement())
    assert caught.value.code is Code.OVERLOADED
    directory.announce(20.0, "a", "edge", Announcement())
    directory.announce(31.0, "c", "edge", Announcement())
    assert [row["name"] for row in directory.rows(31.0)] == ["a", "c"]


@pytest.mark.parametrize(
    "body",
    [
        {"addresses": {"grpc": "x" * 300}},
        {"addresses": {"../x": "h:1"}},
        {"addresses": {f"a{index}": "h:1" for index in range(17)}},
        {"name": "other"},
    ],
)
def test_what_is_said_is_checked(body: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(body, Announcement)
