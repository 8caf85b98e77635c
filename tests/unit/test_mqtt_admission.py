from __future__ import annotations

import json

import pytest

from edge_node.mqtt.admission import Refusal, Request, admit
from edge_node.mqtt.limits import MessageLimits
from nearcast.transport.mqtt.message import Message

LIMITS = MessageLimits(
    payload_bytes_max=64, image_bytes_max=32, json_bytes_max=62, correlation_bytes_max=8, ttl_max_ms=60_000
)
TOPIC = "nc/v1/local/cam/up/infer/digits"


def judged(now=100.0, **fields):
    return admit(Message(**({"topic": TOPIC, "user": {"a": "b"}} | fields)), now, LIMITS, nonce=b"nonce")


@pytest.mark.parametrize(
    ("expiry_s", "user", "deadline"),
    [
        (None, {}, 130.0),
        (5, {}, 105.0),
        (5, {"ttl-ms": "250"}, 100.25),
        (5, {"ttl-ms": "9000"}, 105.0),
        (None, {"ttl-ms": "9000.5"}, 109.0005),
        (100_000, {}, 160.0),
        (0, {}, 100.0),
    ],
)
def test_the_deadline_is_the_smaller_of_expiry_and_ttl_counted_from_arrival(expiry_s, user, deadline):
    request = judged(expiry_s=expiry_s, user={"x": "y"} | user)
    assert isinstance(request, Request)
    assert request.deadline == pytest.approx(deadline)


@pytest.mark.parametrize("ttl", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_ttl_that_is_no_time_is_refused(ttl):
    refusal = judged(user={"ttl-ms": ttl})
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400


def test_without_correlation_nothing_is_echoed_and_the_nonce_stands_in():
    request = judged()
    assert (request.correlation, request.echo) == (b"nonce", False)
    assert judged(correlation=b"abc").echo


@pytest.mark.parametrize(
    ("fields", "status", "topic"),
    [
        ({"payload": b"x" * 65}, 413, "nc/v1/local/cam/down/reply/digits"),
        ({"payload": b"x" * 65, "response_topic": "nc/v1/local/cam/down/q"}, 413, "nc/v1/local/cam/down/q"),
        ({"correlation": b"123456789"}, 400, "nc/v1/local/cam/down/reply/digits"),
        ({"response_topic": "nc/v1/local/other/down/q"}, 403, "nc/v1/local/cam/down/reply/digits"),
        ({"content_type": "image/gif"}, 415, "nc/v1/local/cam/down/reply/digits"),
        ({"topic": "nc/v1/local/cam/up/infer/No"}, 400, "nc/v1/local/cam/down/reply/_"),
        ({"topic": "nonsense"}, 400, ""),
    ],
)
def test_refusals_have_one_status_and_go_to_the_requester(fields, status, topic):
    refusal = judged(**fields)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.topic) == (status, topic)
    assert refusal.reason


def test_content_types_lose_their_parameters_and_accept_outranks_them():
    request = judged(content_type="Application/X-Protobuf; messageType=x", user={"accept": "application/json"})
    assert (request.content_type, request.accept) == ("application/x-protobuf", "application/json")


def test_the_digest_binds_what_changes_the_answer():
    base = judged(payload=b"abc", correlation=b"1")
    assert judged(payload=b"abc", correlation=b"2", user={"a": "c"}, now=7.0).digest == base.digest
    others = [
        judged(payload=b"abd"),
        judged(payload=b"abc", topic=TOPIC + "@2"),
        judged(payload=b"abc", user={"shape": "3"}),
        judged(payload=b"abc", content_type="application/json"),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("suffix", "fields", "wanted"),
    [
        ("", {"user": {}, "payload": b"{}"}, ("application/json", "application/json", True)),
        ("/json", {"user": {}, "payload": b"{}"}, ("application/json", "application/json", True)),
        ("/cbor", {"user": {}, "payload": b"\xa0"}, ("application/cbor", "application/cbor", True)),
        ("/bin", {"user": {}, "payload": b"\xa0"}, ("application/octet-stream", "application/octet-stream", True)),
        ("/cbor", {}, ("application/cbor", "application/cbor", False)),
        ("/json", {"content_type": "application/json"}, ("application/json", "application/json", False)),
        ("", {"content_type": "image/jpg"}, ("image/jpeg", "application/json", False)),
        ("", {"content_type": "audio/x-wav"}, ("audio/wav", "application/json", False)),
    ],
)
def test_the_format_is_the_content_type_or_else_the_topics_last_level(suffix, fields, wanted):
    request = judged(topic=TOPIC + suffix, **fields)
    assert isinstance(request, Request), request
    assert (request.content_type, request.accept, request.envelope) == wanted
    assert request.reply_topic == f"nc/v1/local/cam/down/reply/digits{suffix}"


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"topic": TOPIC + "/cbor", "content_type": "application/json"}, 400, "announces application/cbor"),
        ({"topic": TOPIC + "/raw"}, 400, "/json, /cbor or /bin"),
        ({"user": {"accept": "image/png"}}, 415, "`accept`"),
        ({"user": {"version": "x" * 65}}, 400, "version"),
        ({"user": {str(n): "" for n in range(33)}}, 400, "32 user properties"),
        ({"user": {"note": "x" * 4096}}, 400, "4096 characters"),
        ({"response_topic": "nc/v1/local/cam/down/a/b/c/d"}, 403, "8 levels"),
        ({"content_type": "image/png", "payload": b"x" * 33}, 413, "at most 32 are accepted as image/png"),
        (
            {"content_type": "application/json", "payload": b"x" * 63},
            413,
            "at most 62 are accepted as application/json",
        ),
        ({"topic": TOPIC + "/cbor", "user": {}, "payload": b"\xff"}, 415, "a CBOR map to …/cbor"),
        ({"topic": TOPIC + "/cbor", "user": {}, "payload": b"\xa1\x66ttl_ms\x00"}, 400, "ttl-ms"),
    ],
)
def test_a_refusal_says_what_is_wrong(fields, status, said):
    refusal = judged(**fields)
    assert isinstance(refusal, Refusal)
    assert refusal.status == status
    assert said in refusal.reason


def test_only_what_the_execution_reads_is_kept():
    request = judged(user={"shape": "3", "note": "x", "ttl-ms": "5", "accept": "application/json", "output": "y"})
    assert request.user == {"shape": "3", "output": "y"}


def envelope(**fields):
    return admit(Message(topic=TOPIC, payload=json.dumps(fields).encode()), 100.0, LIMITS, nonce=b"nonce")


def test_a_device_without_properties_speaks_json():
    request = envelope(id="a1", ttl_ms=500, inputs=[])
    assert isinstance(request, Request)
    assert request.envelope
    assert (request.correlation, request.content_type) == (b"a1", "application/json")
    assert request.deadline == pytest.approx(100.5)
    assert request.reply_topic == "nc/v1/local/cam/down/reply/digits"


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b'{"id": 7}', b'{"ttl_ms": "x"}', b"{" * 60])
def test_what_is_no_envelope_is_unsupported(payload):
    refusal = admit(Message(topic=TOPIC, payload=payload), 0.0, LIMITS, nonce=b"n")
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.envelope) == (415, True)
