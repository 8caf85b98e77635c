from __future__ import annotations

import pytest

from nearcast.errors import MeshError
from nearcast.transport.mqtt import topics


def test_a_request_topic_names_tenant_device_model_and_version():
    found = topics.parse_request("nc/v1/local/cam-1/up/infer/digits@3")
    assert found == topics.RequestTopic(tenant="local", device="cam-1", model="digits", version="3")
    assert found.reply == "nc/v1/local/cam-1/down/reply/digits"


@pytest.mark.parametrize(
    "topic",
    [
        "nc/v1/local/CAM/up/infer/digits",
        "nc/v1/local//up/infer/digits",
        "nc/v1/local/cam/up/infer/digits/json/more",
        "nc/v1/local/cam/down/infer/digits",
        "nc/v2/local/cam/up/infer/digits",
        "/nc/v1/local/cam/up/infer/digits",
        f"nc/v1/local/{'x' * 65}/up/infer/digits",
        "nc/v1/local/node/up/infer/digits",
        "nc/v1/local/dlq/up/infer/digits",
        "nc/v1/local/cam\n/up/infer/digits",
        "",
    ],
)
def test_who_cannot_be_answered_is_nobody(topic):
    assert topics.parse_request(topic) is None


@pytest.mark.parametrize(
    "name", ["", "No Model", "a@", "@1", "a@1@2", "a@1 ", "ä", "a@" + "1" * 65, "digits/more", "digits/", "/json"]
)
def test_a_known_device_can_be_told_that_its_model_is_no_name(name):
    found = topics.parse_request(f"nc/v1/local/cam/up/infer/{name}")
    assert found is not None
    assert found.model == ""
    assert found.reply == "nc/v1/local/cam/down/reply/_"


@pytest.mark.parametrize(
    ("topic", "own"),
    [
        ("nc/v1/local/cam/down/reply/x", True),
        ("nc/v1/local/cam/down/anything/at/all", True),
        ("nc/v1/local/cam/down/one/too/many/levels", False),
        ("nc/v1/local/cam/down/", False),
        ("nc/v1/local/cam/down", False),
        ("nc/v1/local/cam2/down/reply/x", False),
        ("nc/v1/other/cam/down/reply/x", False),
        ("nc/v1/local/cam/up/infer/digits", False),
        ("nc/v1/local/cam/down/+", False),
        ("nc/v1/local/cam/down/#", False),
        ("nc/v1/local/cam/down/a\0b", False),
        ("nc/v1/local/cam/down/" + "x" * 600, False),
        (" nc/v1/local/cam/down/x", False),
    ],
)
def test_replies_go_below_the_requesters_own_prefix_only(topic, own):
    assert topics.is_own_reply_topic(topic, "local", "cam") is own


def test_a_request_topic_is_refused_where_it_could_not_be_read_back():
    for tenant, device, model, version in [
        ("A", "d", "m", ""),
        ("t", "node", "m", ""),
        ("t", "d", "m/x", ""),
        ("t", "d", "m", "+"),
    ]:
        with pytest.raises(MeshError):
            topics.request_topic(tenant, device, model, version)
