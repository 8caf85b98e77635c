"""Reports: how an agent makes and signs them, what the controller believes of them, and the book of changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from model_sync.agent.host_link import VersionState
from model_sync.agent.report import ReportBuilder, sign_report
from model_sync.agent.status import AgentStatus, ModelStatus
from model_sync.controller.config import SyncLimits
from model_sync.controller.lineage import Change, Lineage
from model_sync.controller.reports import Reports, read_report
from model_sync.rollout.document import ChannelDocument, Pick, Rollout
from model_sync.rollout.report import REPORT_SIZE_BYTES_MAX, ModelReport, ReleaseReport, SyncReport
from model_sync.rollout.trial import TrialLimits
from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, make_csr

STABLE, CANDIDATE = 1, 2


def picked(release: int) -> Pick:
    return Pick(release=release, manifest_sha256=hashlib.sha256(bytes([release])).hexdigest())


ROLLOUT = Rollout(model="digits", stable=picked(STABLE), candidate=picked(CANDIDATE), share=0.1, salt="s")
DOCUMENT = ChannelDocument(channel="stable", intent=7, rollouts=(ROLLOUT,))


def report(node: str, sequence: int, *releases: ReleaseReport, epoch: str = "e", **fields: object) -> SyncReport:
    model = {"state": "IDLE", "stable": STABLE, "intent": 7} | fields
    return SyncReport(
        node=node, channel="stable", epoch=epoch, sequence=sequence, at=1.0,
        models=(ModelReport(model="digits", releases=releases, **model),),
    )  # fmt: skip


def counted(release: int, requests: int, errors: int = 0) -> ReleaseReport:
    return ReleaseReport(release=release, requests=requests, errors=errors, latency={"60": requests - errors})


def made(**trial: object) -> Reports:
    reports = Reports(TrialLimits(**trial), SyncLimits())
    reports.follow("stable", DOCUMENT)
    return reports


def sums(reports: Reports, release: int) -> tuple[int, int]:
    found = reports.describe("stable", ROLLOUT)["releases"][str(release)]
    return found["requests"], found["errors"]


# The agent's side.


def status(**fields: object) -> AgentStatus:
    model = ModelStatus(state="IDLE", stable=1, quarantined=(2,), reasons={"2": "no " * 400}, error="x" * 900)
    return AgentStatus(node="edge-1", channel="stable", mode="install", models={"digits": model}, **fields)


def test_a_report_fits_the_schema_and_its_counters() -> None:
    state = VersionState(release=1, state="hot", requests=10, errors=1, latency={"60": 9}, compared=4, disagreed=1)
    built = msgspec.json.decode(ReportBuilder().build(status(), {"digits": {1: state}}), type=SyncReport)
    (model,) = built.models
    assert model.releases == (
        ReleaseReport(release=1, requests=10, errors=1, latency={"60": 9}, compared=4, disagreed=1),
    )
    assert model.quarantined == (2,)
    assert model.reasons["2"].startswith("no no")
    assert len(model.error) == 500


def test_the_epoch_changes_when_the_host_began_anew() -> None:
    builder = ReportBuilder()

    def build(requests: int) -> SyncReport:
        state = VersionState(release=1, state="hot", requests=requests)
        return msgspec.json.decode(builder.build(status(), {"digits": {1: state}}), type=SyncReport)

    first, second, third = build(10), build(12), build(3)
    assert (first.epoch, first.sequence) == (second.epoch, 1)
    assert second.sequence == 2
    assert third.epoch != second.epoch
    assert msgspec.json.decode(builder.build(status(), {}), type=SyncReport).epoch == third.epoch, "it is only away"


def test_a_report_that_is_too_long_goes_without_histograms() -> None:
    latency = {str(bucket): 10**12 for bucket in range(256)}
    states = {release: VersionState(release=release, state="hot", latency=latency) for release in range(1, 9)}
    models = {f"m{index}": ModelStatus(state="IDLE") for index in range(200)}
    whole = msgspec.structs.replace(status(), models=models)
    data = ReportBuilder().build(whole, dict.fromkeys(models, states))
    assert len(data) <= REPORT_SIZE_BYTES_MAX
    assert len(msgspec.json.decode(data, type=SyncReport).models) == 200


def test_a_signature_is_over_exact_bytes_by_the_nodes_own_key(tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    data = msgspec.json.encode(report("edge-1", 1))
    signatures, certificates = {}, {}
    for name in ("edge-1", "edge-2"):
        key, csr = make_csr(name, "edge")
        (tmp_path / name).write_bytes(key)
        certificate = authority.issue(csr, name=name, role="edge", lifetime_s=600.0)
        der = x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER)
        signatures[name], certificates[name] = sign_report(data, tmp_path / name), der
    assert read_report(data, "edge-1", signatures["edge-1"], certificates["edge-1"]).node == "edge-1"
    for bad in (signatures["edge-2"], "", "no base64!", signatures["edge-1"][:-4]):
        with pytest.raises(MeshError, match="not signed"):
            read_report(data, "edge-1", bad, certificates["edge-1"])
    with pytest.raises(MeshError, match="not signed"):
        read_report(data + b" ", "edge-1", signatures["edge-1"], certificates["edge-1"])
    with pytest.raises(MeshError, match="each speaks for itself"):
        read_report(data, "edge-2", signatures["edge-2"], certificates["edge-2"])
    with pytest.raises(MeshError, match="no readable private key"):
        sign_report(data, tmp_path / "absent")


# The controller's side.


def test_repeated_and_older_reports_are_ignored() -> None:
    reports = made()
    assert reports.take(0.0, report("a", 5, counted(1, 100)), 100)
    for old in (report("a", 5, counted(1, 900)), report("a", 4, counted(1, 900))):
        assert not reports.take(1.0, old, 100)
    assert sums(reports, 1) == (100, 0)
    assert reports.take(2.0, report("a", 1, counted(1, 7), epoch="f"), 100)
    assert not reports.take(3.0, report("a", 9, counted(1, 900), epoch="e"), 100), "the former epoch is over"
    assert sums(reports, 1) == (107, 0), "a host that began anew counts from zero"


def test_an_agent_that_began_anew_beside_the_same_host_counts_nothing_twice() -> None:
    reports = made()
    reports.take(0.0, report("a", 5, counted(1, 100, 3)), 100)
    reports.take(1.0, report("a", 1, counted(1, 130, 4), epoch="f"), 100)
    reports.take(1.0, report("b", 1, counted(1, 10)), 100)
    assert sums(reports, 1) == (140, 4)


def test_a_trial_that_fails_is_named_once_with_its_reason() -> None:
    reports = made()
    for turn in range(60):
        for node in ("a", "b", "c"):
            reports.take(0.0, report(node, turn, counted(1, 900 * turn, 9 * turn), counted(2, 100 * turn, 4 * turn)), 1)
    (stop,) = reports.judge()
    assert (stop.channel, stop.model, stop.release) == ("stable", "digits", 2)
    assert "4.00% of 17700 requests fail, of stable 1.00%" in stop.reason
    assert reports.judge() == [], "nothing new"
    described = reports.describe("stable", ROLLOUT)
    assert described["trial"]["findings"]["errors"]["progress"] > 1
    assert described["states"] == {"IDLE": 3}
    reports.follow("stable", ChannelDocument(channel="stable", intent=8))
    assert reports.describe("stable", ROLLOUT)["trial"] is None


def test_the_first_report_is_where_a_trial_begins_to_count() -> None:
    reports = made()
    for node in ("a", "b", "c"):
        reports.take(0.0, report(node, 1, counted(1, 10_000, 10), counted(2, 10_000, 9_000)), 1)
    assert reports.judge() == [], "whatever the counters held before"


def test_nodes_that_threw_the_candidate_out_stop_it_together_only() -> None:
    reports = made()
    for node in ("a", "b", "c"):
        reports.take(0.0, report(node, 1), 1)
    reports.take(1.0, report("a", 2, quarantined=(CANDIDATE,), reasons={"2": "it fails."}), 1)
    assert reports.judge() == []
    reports.take(2.0, report("b", 2, quarantined=(CANDIDATE,), reasons={"2": "it fails."}), 1)
    (stop,) = reports.judge()
    assert "2 of 2 nodes" in stop.reason
    reports.take(3.0, report("router", 1, state="FOLLOW", candidate=CANDIDATE), 1)
    assert "2 of 2 nodes" in reports.judge()[0].reason, "a router holds no models"
    assert reports.describe("stable", ROLLOUT)["quarantined"] == [{"release": 2, "nodes": 2, "reasons": ["it fails."]}]


def test_room_is_bounded() -> None:
    reports = Reports(TrialLimits(), SyncLimits(nodes_max=2, reports_bytes_max=1000, report_ttl_s=10.0))
    reports.take(0.0, report("a", 1), 400)
    reports.take(5.0, report("b", 1), 400)
    with pytest.raises(MeshError) as full:
        reports.take(6.0, report("c", 1), 100)
    assert full.value.code is Code.OVERLOADED
    assert reports.take(12.0, report("c", 1), 400), "the silent one makes room"
    with pytest.raises(MeshError, match="bytes together"):
        reports.take(13.0, report("b", 2), 700)
    reports.forget("c")
    assert reports.take(14.0, report("b", 2), 700)
    assert reports.names(14.0) == {"b"}


def test_the_book_of_changes(tmp_path: Path) -> None:
    book = Lineage(tmp_path / "control.db")
    one = Change(at=1.0, by="ann", channel="stable", model="digits", action="stable", release=1, intent=1)
    two = Change(
        at=2.0, by="controller", channel="stable", model="digits", action="stop", release=2, replaced=1,
        manifest_sha256="a" * 64, data_sha256="d" * 64, reason="It fails.", intent=3,
    )  # fmt: skip
    other = Change(at=3.0, by="ben", channel="", model="words", action="publish", release=1)
    book.append(one, two)
    book.append(other)
    again = Lineage(tmp_path / "control.db")
    assert again.read("digits") == [two, one]
    assert again.read() == [other, two, one]
    assert again.read("'; DROP TABLE lineage") == []
    assert (tmp_path / "control.db").stat().st_mode & 0o777 == 0o600
