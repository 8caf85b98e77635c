"""What answers say about their server beside their own times: ORCA's text form, written rarely and read rarely."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.handler import Served
from nearcast.load import AnswerLoad, NodeReport, VersionReport, read_answer_load, write_answer_load
from nearcast.wire.status import LOAD, served_from_trailers, served_to_trailers
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send

TIMES = st.floats(0.0, 1e9)


@given(st.builds(AnswerLoad, utilization=TIMES, queue_us=TIMES, service_p50_us=TIMES, service_p95_us=TIMES))
def test_what_is_written_is_read(load: AnswerLoad) -> None:
    served = Served(node="a", in_flight=7, load=write_answer_load(load))
    trailers = dict(served_to_trailers(served))
    assert trailers[LOAD].startswith("TEXT named_metrics.nc_in_flight=7,application_utilization=")
    read = served_from_trailers(trailers)
    assert (read.in_flight, read.load) == (7, served.load)
    found = read_answer_load(read.load)
    for name in ("utilization", "queue_us", "service_p50_us", "service_p95_us"):
        assert getattr(found, name) == pytest.approx(getattr(load, name), rel=1e-4)


def test_most_answers_say_nothing_more() -> None:
    trailers = served_to_trailers(Served(node="a", in_flight=7))
    assert served_from_trailers(trailers).load == ""


@pytest.mark.parametrize(
    ("header", "utilization"),
    [
        ("TEXT application_utilization=0.75, cpu_utilization=0.3", 0.75),
        ("TEXT cpu_utilization=0.3,application_utilization=0.5,named_metrics.nc_in_flight=2", 0.5),
        ("TEXT application_utilization=nan,mem_utilization=0.1", 0.0),
        ("TEXT application_utilization=-3,mem_utilization=0.1", 0.0),
        ("TEXT application_utilization=,,,=====,named_metrics.=x", 0.0),
        ('JSON {"application_utilization": 0.5}', 0.0),
    ],
)
def test_servers_of_others(header: str, utilization: float) -> None:
    served = served_from_trailers({LOAD: header})
    assert read_answer_load(served.load).utilization == utilization


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    read_answer_load(served_from_trailers({LOAD: text}).load)


def policy_with(claims: VersionReport) -> Policy:
    policy = Policy(PolicyConfig(), seed=1)
    policy.add_target(0.0, "a", "peer")
    policy.on_report(0.0, "a", NodeReport(node="a", role="edge", slots=4, versions=(claims,)))
    return policy


def answer(policy: Policy, now: float, served: Served) -> None:
    attempt = policy.on_sent(now, RequestFacts(model="m"), Send("a", "1"))
    policy.on_reply(now + 0.001, attempt, Outcome(served=served))


def test_an_answer_renews_what_is_claimed() -> None:
    policy = policy_with(VersionReport(model="m", version="1", service_p50_us=1000.0))
    version = policy.targets[0].versions["m", "1"]
    said = Served(compute_us=900, load=write_answer_load(AnswerLoad(service_p50_us=9000.0, batch_wait_us=500.0)))
    answer(policy, 1.0, said)
    assert (version.p50_claim_s, version.wait_claim_s) == (0.009, 0.0005)
    # Again within the pause: not even looked at.
    answer(policy, 1.001, Served(compute_us=900, load=write_answer_load(AnswerLoad(service_p50_us=1.0))))
    assert version.p50_claim_s == 0.009


def test_the_utilization_of_a_foreign_server_is_load() -> None:
    policy = policy_with(VersionReport(model="m", version="1"))
    (target,) = policy.targets
    for i in range(40):
        answer(policy, 1.0 + i, Served(node="a", load=",application_utilization=2.5"))
    assert target.load == pytest.approx(10.0, rel=0.1)
    answer(policy, 50.0, Served(node="a", load=",application_utilization=1e300"))
    assert target.load < 1000.0
