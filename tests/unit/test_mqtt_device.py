"""The rules of a device, without a loop: what it keeps, when it sends again, when it stops."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nearcast.client.mqtt import MqttDevice
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.client.mqtt_outbox import End, Outbox, Send
from nearcast.client.mqtt_shadow import Shadow
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.message import Message

LIMITS = DeviceLimits(kept_max=8, kept_bytes_max=100, in_flight_max=4, silence_s=1.0, silence_s_max=4.0)


def request(text: str = "x") -> Message:
    return Message(topic="nc/v1/local/d/up/infer/m", payload=text.encode(), correlation=b"k", user={"dtype": "FP32"})


def reply(**user: str) -> Message:
    return Message(
        topic="nc/v1/local/d/down/reply/m", user={name.replace("_", "-"): text for name, text in user.items()}
    )


def box(*, online: bool = True, window: int = 100) -> Outbox:
    outbox = Outbox(LIMITS, Random(1))
    if online:
        assert outbox.online(0.0, window) == []
    return outbox


def sent(instructions) -> list[bytes]:
    return [each.key for each in instructions if isinstance(each, Send)]


def test_a_request_states_the_time_that_is_left_whenever_it_is_sent():
    outbox = box()
    (first,) = outbox.put(0.0, b"k", request(), deadline=5.0, is_request=True)
    assert first.message.user == {"dtype": "FP32", "ttl-ms": "5000"}
    assert first.message.expiry_s == 5
    outbox.offline("gone")
    (again,) = outbox.online(3.25, 100)
    assert (again.message.user["ttl-ms"], again.message.expiry_s) == ("1750", 2)
    assert (again.message.correlation, again.message.payload) == (b"k", b"x")


def test_a_confirmed_request_is_sent_again_after_a_growing_pause_and_an_unconfirmed_one_is_not():
    outbox = box()
    outbox.put(0.0, b"k", request(), deadline=100.0, is_request=True)
    assert sent(outbox.tick(90.0)) == [], "TCP keeps it; a second copy would help nobody"
    pauses, now = [], 0.0
    for _ in range(4):
        outbox.confirmed(now, b"k", taken=True)
        pauses.append(outbox.wake_up_at - now)
        now = outbox.wake_up_at
        assert sent(outbox.tick(now)) == [b"k"]
    assert all(1.0 < pause <= 1.0 + min(4.0, 2.0**attempt) for attempt, pause in enumerate(pauses))


def test_a_new_connection_has_its_whole_window_and_sends_nothing_that_is_overdue():
    outbox = box()
    for index in range(6):
        outbox.put(0.0, b"%d" % index, request(), deadline=1.0 + index, is_request=True)
    outbox.offline("gone")
    assert sent(outbox.online(1.5, 100)) == [b"1", b"2", b"3", b"4"]
    assert sent(outbox.confirmed(1.6, b"1", taken=True)) == [b"5"]
    assert [each.key for each in outbox.tick(1.6)] == [b"0"]


def test_a_refusal_that_overtakes_the_puback_sets_the_pause():
    outbox = box()
    outbox.put(0.0, b"k", request(), deadline=100.0, is_request=True)
    outbox.replied(0.1, b"k", reply(status="429", retry_after_ms="30000"))
    assert sent(outbox.confirmed(0.2, b"k", taken=True)) == []
    assert sent(outbox.tick(30.0)) == []
    assert sent(outbox.tick(31.2)) == [b"k"]


def test_not_accepted_is_asked_again_later_and_a_stored_refusal_is_final():
    outbox = box()
    outbox.put(0.0, b"k", request(), deadline=10.0, is_request=True)
    outbox.confirmed(0.0, b"k", taken=True)
    assert outbox.replied(0.1, b"k", reply(status="429", retry_after_ms="200")) == []
    assert outbox.wake_up_at > 0.3
    assert sent(outbox.tick(outbox.wake_up_at)) == [b"k"]
    stored = reply(status="503", retry_after_ms="200", dedup="1")
    assert outbox.replied(2.0, b"k", stored) == [End(key=b"k", reply=stored)]
    assert outbox.replied(2.0, b"k", stored) == [], "the second copy"


@pytest.mark.parametrize("pause", ["", "x", "9" * 5000, "-1", "²"])
def test_a_pause_that_is_no_number_or_beyond_the_deadline_ends_the_request(pause):
    for text in (pause, "60000"):
        outbox = box()
        outbox.put(0.0, b"k", request(), deadline=10.0, is_request=True)
        answer = reply(status="429", retry_after_ms=text)
        assert outbox.replied(0.1, b"k", answer) == [End(key=b"k", reply=answer)]


def test_who_never_had_a_broker_is_told_so_and_who_had_one_that_nobody_answered():
    outbox = box(online=False)
    outbox.offline("No MQTT broker at h:1.")
    assert outbox.put(0.0, b"k", request(), deadline=1.0, is_request=True) == []
    (end,) = outbox.tick(1.0)
    assert (end.error.code, end.error.message, end.error.sent) == (Code.UNAVAILABLE, "No MQTT broker at h:1.", False)
    outbox = box()
    outbox.put(0.0, b"k", request(), deadline=1.0, is_request=True)
    (end,) = outbox.tick(1.0)
    assert (end.error.code, end.error.sent, len(outbox)) == (Code.DEADLINE, True, 0)
    assert "sent once. Does a node read" in end.error.message
    outbox.put(2.0, b"late", request(), deadline=1.5, is_request=True)
    (end,) = outbox.tick(2.0)
    assert (end.error.message, end.error.sent) == ("The deadline passed before it could be sent.", False)


def test_a_sample_ends_with_its_puback_and_a_refused_message_at_once():
    outbox = box()
    outbox.put(0.0, b"s", request(), is_request=False)
    assert outbox.confirmed(0.1, b"s", taken=True) == [End(key=b"s")]
    outbox.put(0.0, b"k", request(), deadline=9.0, is_request=True)
    (end,) = outbox.confirmed(0.1, b"k", taken=False)
    assert end.error.code is Code.FORBIDDEN


def test_what_is_kept_is_bounded_by_number_and_bytes():
    outbox = box(online=False)
    for index in range(8):
        outbox.put(0.0, b"%d" % index, request(), is_request=False)
    with pytest.raises(MeshError) as full:
        outbox.put(0.0, b"8", request(), is_request=False)
    assert full.value.code is Code.OVERLOADED
    outbox.forget(b"0")
    with pytest.raises(MeshError):
        outbox.put(0.0, b"8", request("y" * 100), is_request=False)
    with pytest.raises(MeshError) as taken:
        outbox.put(0.0, b"1", request(), is_request=False)
    assert taken.value.code is Code.CONFLICT


def test_ended_requests_leave_no_growing_list_of_wake_ups():
    outbox = box()
    for index in range(1000):
        key = b"%d" % index
        outbox.put(0.0, key, request(), deadline=3600.0, is_request=True)
        outbox.confirmed(0.0, key, taken=True)
        outbox.replied(0.0, key, reply(status="200"))
    assert len(outbox._wake_ups) <= 4 * LIMITS.kept_max + 1


class Device(RuleBasedStateMachine):
    """Any interleaving of requests, samples, PUBACKs, replies, losses and waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.outbox = Outbox(LIMITS, Random(7))
        self.made = 0
        self.window = 0
        self.deadlines: dict[bytes, float] = {}
        self.unconfirmed: list[bytes] = []
        self.sent_in_this_epoch: list[int] = []
        self.ended: set[bytes] = set()

    def do(self, instructions) -> None:
        for each in instructions:
            assert each.key not in self.ended, "what has ended is neither sent nor ended again"
            if isinstance(each, Send):
                self.unconfirmed.append(each.key)
                if self.deadlines[each.key] == float("inf"):
                    self.sent_in_this_epoch.append(int(each.key))
            else:
                self.ended.add(each.key)

    @rule(is_request=st.booleans(), ttl_s=st.floats(0.1, 10.0))
    def put(self, is_request, ttl_s):
        key = b"%d" % self.made
        self.made += 1
        self.deadlines[key] = self.now + ttl_s if is_request else float("inf")
        try:
            self.do(self.outbox.put(self.now, key, request(), deadline=self.deadlines[key], is_request=is_request))
        except MeshError:
            self.ended.add(key)

    @rule(window=st.integers(1, 6))
    def connect(self, window):
        self.window, self.unconfirmed, self.sent_in_this_epoch = min(window, LIMITS.in_flight_max), [], []
        self.do(self.outbox.online(self.now, window))

    @rule()
    def lose(self):
        self.window = 0
        self.outbox.offline("gone")

    @precondition(lambda self: self.window and self.unconfirmed)
    @rule(data=st.data())
    def confirm(self, data):
        key = self.unconfirmed.pop(data.draw(st.integers(0, len(self.unconfirmed) - 1)))
        instructions = self.outbox.confirmed(self.now, key, taken=True)
        if key in self.ended:
            assert all(each.key != key for each in instructions)
        self.do(instructions)

    @precondition(lambda self: self.made)
    @rule(data=st.data(), retry=st.booleans())
    def answer(self, data, retry):
        key = b"%d" % data.draw(st.integers(0, self.made - 1))
        self.do(self.outbox.replied(self.now, key, reply(status="429", retry_after_ms="100") if retry else reply()))

    @rule(pause_s=st.floats(0.0, 3.0))
    def wait(self, pause_s):
        self.now += pause_s
        self.do(self.outbox.tick(self.now))

    @invariant()
    def window_holds(self):
        assert not self.window or len(self.unconfirmed) <= self.window

    @invariant()
    def samples_of_an_epoch_are_in_order_and_once(self):
        assert self.sent_in_this_epoch == sorted(set(self.sent_in_this_epoch))

    @invariant()
    def nothing_outlives_its_deadline_and_everything_is_accounted(self):
        open_keys = {key for key in self.deadlines if key not in self.ended}
        assert len(self.outbox) == len(open_keys)
        due = [self.deadlines[key] for key in open_keys if self.deadlines[key] < float("inf")]
        assert not due or self.outbox.wake_up_at <= min(due)


Device.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_interleaving = Device.TestCase


@given(st.lists(st.integers(1, 5), max_size=12))
def test_only_a_newer_wish_counts(versions):
    shadow, newest = Shadow(), 0
    for version in versions:
        wish = shadow.read(json.dumps({"version": version, "desired": {"rate": version}}).encode())
        assert wish == ({"rate": version} if version > newest else None)
        newest = max(newest, version)
    assert json.loads(shadow.report())["version"] == newest


@pytest.mark.parametrize(
    "bad", [b"", b"[]", b'{"desired":{}}', b'{"version":0}', b'{"version":true}', b"\xff", b"[" * 9999]
)
def test_a_wish_without_a_version_is_refused(bad):
    with pytest.raises(MeshError):
        Shadow().read(bad)


@pytest.mark.parametrize("url", ["mqtt://h:1", "mqtt://h:1/local", "mqtt://h:1/local/"])
def test_a_url_without_a_device_is_refused_with_the_form_that_it_needs(url):
    with pytest.raises(MeshError, match="mqtt://host:port/tenant/device"):
        MqttDevice(url)
