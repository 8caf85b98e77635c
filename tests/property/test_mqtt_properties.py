from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_node.mqtt.ack_window import AckWindow
from edge_node.mqtt.admission import Refusal, admit
from edge_node.mqtt.idempotency import Known, decide, digest_of
from edge_node.mqtt.limits import MessageLimits
from nearcast.transport.mqtt import content_types as types
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

IDS = st.from_regex(topics.ID_PATTERN, fullmatch=True).filter(lambda name: name not in topics.RESERVED_DEVICES)
VERSIONS = st.just("") | st.from_regex(topics.VERSION_PATTERN, fullmatch=True)
LIMITS = MessageLimits(payload_bytes_max=256)


@given(IDS, IDS, IDS, VERSIONS)
def test_request_topics_round_trip(tenant, device, model, version):
    found = topics.parse_request(topics.request_topic(tenant, device, model, version))
    assert found == topics.RequestTopic(tenant=tenant, device=device, model=model, version=version)
    assert topics.is_own_reply_topic(found.reply, tenant, device)


@given(IDS, IDS, IDS, st.text(max_size=20))
def test_no_reply_topic_belongs_to_two_devices(tenant, device, other, rest):
    topic = topics.down_prefix(tenant, other) + rest
    assert topics.is_own_reply_topic(topic, tenant, device) is (
        device == other and topics.is_own_reply_topic(topic, tenant, other)
    )


MESSAGES = st.builds(
    Message,
    topic=st.sampled_from(["", "/json", "/cbor", "/bin", "/x"]).map("nc/v1/local/cam/up/infer/digits{}".format)
    | st.text(max_size=60),
    payload=st.binary(max_size=300),
    content_type=st.sampled_from(["", *types.REQUEST_TYPES]) | st.text(max_size=20),
    correlation=st.binary(max_size=200),
    response_topic=st.sampled_from(["", "nc/v1/local/cam/down/a", "nc/v1/local/other/down/a"]) | st.text(max_size=60),
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user=st.dictionaries(st.sampled_from(["ttl-ms", "accept", "shape", "version"]), st.text(max_size=12)),
)


@given(MESSAGES, st.floats(0, 1e9))
def test_every_message_is_admitted_or_refused_and_answers_stay_at_home(message, now):
    verdict = admit(message, now, LIMITS, nonce=b"nonce")
    if isinstance(verdict, Refusal):
        assert 400 <= verdict.status < 500
        assert verdict.reason
        if verdict.topic:
            assert topics.parse_request(message.topic) is not None
            assert verdict.topic.startswith("nc/v1/")
            tenant, device = verdict.topic.split("/")[2:4]
            assert topics.is_own_reply_topic(verdict.topic, tenant, device)
            assert message.topic.startswith(f"nc/v1/{tenant}/{device}/up/")
    else:
        assert len(message.payload) <= LIMITS.payload_bytes_max
        assert topics.is_own_reply_topic(verdict.reply_topic, verdict.tenant, verdict.device)
        assert now <= verdict.deadline <= now + LIMITS.ttl_max_ms / 1e3 + 1e-6
        assert verdict.correlation


@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "finish"]), st.integers(0, 3), st.integers(0, 1), st.booleans()), max_size=60
    )
)
def test_a_key_is_accepted_once_and_never_answers_two_digests(steps):
    known: dict[int, Known] = {}
    accepted: dict[int, bytes] = {}
    for action, key, variant, has_room in steps:
        digest = bytes([variant])
        if action == "finish":
            if key in known:
                known[key] = Known(known[key].digest, "done")
            continue
        verdict = decide(known.get(key), digest, has_room=has_room)
        if verdict == "accept":
            assert key not in accepted
            assert has_room
            accepted[key] = digest
            known[key] = Known(digest, "pending")
        elif verdict in ("pending", "replay"):
            assert accepted[key] == digest
            assert (known[key].state == "done") is (verdict == "replay")
        elif verdict == "conflict":
            assert accepted[key] != digest
        else:
            assert key not in accepted


FIELDS = st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), max_size=4)


@given(FIELDS, st.binary(max_size=12), FIELDS, st.binary(max_size=12))
def test_digests_differ_where_requests_differ(fields, payload, others, other):
    same = (fields, payload) == (others, other)
    assert (digest_of(fields, payload) == digest_of(others, other)) is same


@given(st.permutations(list(range(12))))
def test_acknowledgements_come_out_in_order_whatever_ends_first(order):
    window = AckWindow()
    tickets = [window.open(mid, 0.0, 1) for mid in range(12)]
    out = [mid for index in order for mid in window.complete(tickets[index])]
    assert out == list(range(12))
