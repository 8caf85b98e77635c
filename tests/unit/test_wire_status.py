from __future__ import annotations

import math

import pytest

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import Served
from nearcast.load import NodeReport, VersionReport
from nearcast.wire import status
from nearcast.wire.report import LIMITS, decode_report, encode_report
from nearcast.wire.v1 import mesh_pb2


@pytest.mark.parametrize("code", list(Code))
def test_every_error_survives_the_trip(code):
    sent = MeshError(code, "It broke: 100 %\r\nnc-evil: ü", retry_after_ms=250, sent=True)
    out = status.error_to_status(sent)
    assert out.code == CATALOGUE[code].grpc
    assert out.message.isascii()
    assert out.message.isprintable()
    back = status.error_from_status(out.code, out.message, out.trailers, kind=MeshError)
    assert (back.code, back.message, back.retry_after_ms, back.sent) == (code, sent.message, 250, True)


def test_refusals_of_our_own_nodes_were_never_executed():
    out = status.error_to_status(MeshError(Code.UNAVAILABLE, "draining"))
    assert not status.error_from_status(out.code, out.message, out.trailers, kind=MeshError).sent


@pytest.mark.parametrize(
    ("number", "code", "sent"),
    [
        (3, Code.INVALID_REQUEST, False),
        (5, Code.MODEL_NOT_FOUND, False),
        (8, Code.OVERLOADED, False),
        (14, Code.UNAVAILABLE, True),
        (4, Code.DEADLINE, True),
        (13, Code.INTERNAL, True),
        (2, Code.INTERNAL, True),
        (77, Code.INTERNAL, True),
    ],
)
def test_statuses_of_foreign_servers(number, code, sent):
    error = status.error_from_status(number, "why", {}, kind=MeshError)
    assert (error.code, error.sent) == (code, sent)
    assert "why" in error.message
    if number in (2, 77):
        assert str(number) in error.message


def test_garbage_trailers_do_not_matter():
    error = status.error_from_status(14, "%zz%41", {"nc-code": "NO", "nc-retry-after-ms": "-x"}, kind=MeshError)
    assert (error.message, error.retry_after_ms) == ("%zzA", None)


def test_messages_are_bounded():
    assert len(status.encode_message("x" * 10**6)) < 3 * status.MESSAGE_CHARS_MAX


@pytest.mark.parametrize(
    ("text", "seconds"), [("1H", 3600), ("2M", 120), ("3S", 3), ("250m", 0.25), ("99999999u", 99.999999), ("1n", 1e-9)]
)
def test_timeouts(text, seconds):
    assert math.isclose(status.parse_timeout(text), seconds)


@pytest.mark.parametrize("text", ["", "1", "S", "123456789S", "-1S", "1.5S", "1s", "1S ", "\u0661S"])
def test_malformed_timeouts(text):
    with pytest.raises(MeshError):
        status.parse_timeout(text)


@pytest.mark.parametrize("value", ["a\r\nb", "ü", "a\0", "a\x7f"])
def test_metadata_values_must_be_printable_ascii(value):
    with pytest.raises(MeshError) as caught:
        status.require_metadata_value("nc-version", value)
    assert caught.value.code is Code.INVALID_REQUEST


def test_served_survives_the_trip():
    served = Served(node="knöten\n1", tier="cloud", version="12", queue_us=5, compute_us=1234, in_flight=3)
    trailers = status.served_to_trailers(served)
    assert all(value.isascii() and value.isprintable() for _, value in trailers)
    assert ("endpoint-load-metrics", "TEXT named_metrics.nc_in_flight=3") in trailers
    assert status.served_from_trailers(trailers) == served


def test_what_a_foreign_server_says_of_itself_goes_on_printable_and_bounded():
    fields = status.served_to_fields(
        Served(node="ö" * 9000, version="\r\n", load=",x=\x00" + "y" * 9000, escalate="z" * 9000)
    )
    assert all(value.isascii() and value.decode().isprintable() for _, value in fields)
    assert sum(len(name) + len(value) for name, value in fields) < 8192


def test_served_of_a_foreign_server_is_empty():
    assert status.served_from_trailers({"endpoint-load-metrics": "JSON {}", "nc-queue-us": "NaN"}) == Served()
    load = {"endpoint-load-metrics": "TEXT cpu_utilization=0.3, named_metrics.nc_in_flight=7.0, eps=1"}
    assert status.served_from_trailers(load).in_flight == 7


def test_report_survives_the_trip():
    report = NodeReport(
        node="edge-1",
        role="edge",
        slots=2,
        in_flight=3,
        draining=True,
        versions=(
            VersionReport(model="a", version="1", residency="loading", eta_ms=12.5, stateful="hidden", quality=0.5),
            VersionReport(model="a", version="2", in_flight=1, queue_us=5, service_p50_us=10, service_p95_us=20),
            VersionReport(model="b", version="7", residency="cold", stateful="explicit", quality=0.0),
        ),
    )
    assert decode_report(encode_report(report)) == report


def test_lies_are_clamped():
    liar = mesh_pb2.NodeReport(node="x" * 1000, slots=0, in_flight=2**32 - 1)
    liar.versions.add(
        model="m", version="1", quality=9.0, service_p50_us=math.nan, service_p95_us=-1.0, eta_ms=math.inf
    )
    liar.versions.add(model="m", version="1", quality=0.1)
    liar.versions.add(model="n", version="1", quality=math.nan, queue_us=-5, residency=99, stateful=99)
    report = decode_report(liar.SerializeToString())
    assert (len(report.node), report.slots, report.in_flight) == (LIMITS.name_chars_max, 1, LIMITS.in_flight_max)
    first, second = report.versions
    assert (first.quality, first.eta_ms) == (1.0, LIMITS.eta_ms_max)
    assert first.service_p95_us == first.service_p50_us == LIMITS.time_us_max
    assert (second.residency, second.stateful, second.quality, second.queue_us) == ("cold", "hidden", 0.0, 0.0)


@pytest.mark.parametrize("body", [b"\x0a\x05a", b"\0" * 2 * 1024 * 1024])
def test_malformed_reports(body):
    with pytest.raises(MeshError) as caught:
        decode_report(body)
    assert caught.value.code is Code.INTERNAL


@pytest.mark.parametrize("start", ["", "a", "ab", "abc", "%", "é", "你a"])
@pytest.mark.parametrize("char", ["😀", "你", "é", "%"])
def test_what_is_escaped_is_cut_between_characters(start, char):
    text = start + char * 512
    said = Served(node=text, tier=text, version=text, load=text, escalate=text)
    fields = status.served_to_fields(said)
    assert sum(len(name) + len(value) + 32 for name, value in fields) < 4096
    served = status.served_from_trailers((name.decode(), value.decode()) for name, value in fields)
    for found in (served.node, served.tier, served.version, served.escalate):
        assert text.startswith(found)
        assert len(status.encode_message(found)) > status.SERVED_CHARS_MAX - 24
